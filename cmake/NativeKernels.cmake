# The kernels as one library with plain C functions, which Python opens with ctypes.
# Never -ffast-math: every path must give the same bits as NumPy. setup.py reads the same flags.
file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/cxx_flags.txt MPI_DASGD_CXX_FLAGS)
file(GLOB MPI_DASGD_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/mpi_dasgd/kernels/cpu/*.cpp)

add_library(_native MODULE ${MPI_DASGD_SOURCES})
target_include_directories(_native PRIVATE ${PROJECT_SOURCE_DIR}/mpi_dasgd/kernels)
target_compile_features(_native PRIVATE cxx_std_17)
target_compile_options(_native PRIVATE ${MPI_DASGD_CXX_FLAGS})
set_target_properties(_native PROPERTIES PREFIX "" SUFFIX ".so")
