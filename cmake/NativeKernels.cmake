# Builds the kernels as one library with plain C functions, which Python loads with ctypes.
# Never -ffast-math: every backend must give the same bits as NumPy. setup.py reads the same flags.
include(CheckCXXSourceCompiles)
find_package(Threads REQUIRED)
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/cxx_flags.txt MPI_DASGD_CXX_FLAGS)
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/instruction_sets.txt MPI_DASGD_INSTRUCTION_SETS)
set(CPU ${PROJECT_SOURCE_DIR}/mpi_dasgd/kernels/cpu)

add_library(_native MODULE ${CPU}/adaptive_scale.cpp ${CPU}/control_words.cpp ${CPU}/dispatch.cpp
  ${CPU}/finite.cpp ${CPU}/inbox.cpp ${CPU}/node_rank.cpp ${CPU}/pair_average.cpp ${CPU}/pair_exchange.cpp
  ${CPU}/publication.cpp ${CPU}/release.cpp ${CPU}/step_words.cpp ${CPU}/struct_layout.cpp)
target_compile_features(_native PRIVATE cxx_std_17)
target_compile_options(_native PRIVATE ${MPI_DASGD_CXX_FLAGS})
target_link_libraries(_native PRIVATE Threads::Threads)
set_target_properties(_native PROPERTIES PREFIX "" SUFFIX ".so")

# Once per instruction set that the compiler knows; dispatch.cpp chooses among them.
function(add_instruction_set name)
  add_library(lattice_${name} OBJECT ${CPU}/lattice.cpp ${CPU}/optimizer.cpp ${CPU}/roofline.cpp)
  set_target_properties(lattice_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_compile_features(lattice_${name} PRIVATE cxx_std_17)
  target_compile_definitions(lattice_${name} PRIVATE MPD_ISA=${name})
  target_compile_options(lattice_${name} PRIVATE ${MPI_DASGD_CXX_FLAGS} ${ARGN})
  target_sources(_native PRIVATE $<TARGET_OBJECTS:lattice_${name}>)
endfunction()

add_instruction_set(base)
foreach(line ${MPI_DASGD_INSTRUCTION_SETS})
  string(REPLACE " " ";" flags ${line})
  list(POP_FRONT flags name)
  string(REPLACE ";" " " joined "${flags}")
  set(CMAKE_REQUIRED_FLAGS ${joined})
  check_cxx_source_compiles("int main() {}" MPI_DASGD_COMPILES_${name})
  if(MPI_DASGD_COMPILES_${name})
    add_instruction_set(${name} ${flags})
    string(TOUPPER ${name} upper)
    target_compile_definitions(_native PRIVATE MPD_HAVE_${upper})
  endif()
endforeach()
