// Chooses the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fused_step.h"
#include "optimizer.h"
#include "parallel.h"
#include "roofline.h"

#define MPD_DECLARE(isa)                                                                         \
  extern "C" void mpd_optimizer_##isa(const MpdOptimizer*, float* x, int64_t begin, int64_t end, \
                                      int64_t* segment, int ahead);                              \
  extern "C" void mpd_fused_step_##isa(const MpdFusedStep*, int64_t first, int64_t last);        \
  extern "C" void mpd_roofline_##isa(const MpdFusedStep*, int32_t pass, float* scratch,          \
                                     int64_t first, int64_t last);
MPD_DECLARE(base)
#ifdef MPD_HAVE_AVX2
MPD_DECLARE(avx2)
#endif
#ifdef MPD_HAVE_AVX512
MPD_DECLARE(avx512)
#endif

namespace {

struct InstructionSet {
  const char* name;
  MpdFusedStepRange fused_step;
  MpdRooflineRange roofline;
  MpdOptimizerRange optimizer;
  bool supported;
};

// Best first; the last one is supported by every machine that the library was compiled for.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> all = {
#ifdef MPD_HAVE_AVX512
      {"AVX-512", mpd_fused_step_avx512, mpd_roofline_avx512, mpd_optimizer_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd")},
#endif
#ifdef MPD_HAVE_AVX2
      {"AVX2", mpd_fused_step_avx2, mpd_roofline_avx2, mpd_optimizer_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#if defined(__SSE2__)
      {"SSE2", mpd_fused_step_base, mpd_roofline_base, mpd_optimizer_base, true},
#else
      {"portable", mpd_fused_step_base, mpd_roofline_base, mpd_optimizer_base, true},
#endif
  };
  return all;
}

const InstructionSet*& active() {
  static const InstructionSet* set = [] {
    for (const InstructionSet& candidate : instruction_sets())
      if (candidate.supported) return &candidate;
    return static_cast<const InstructionSet*>(nullptr);
  }();
  return set;
}

}  // namespace

extern "C" {

int64_t mpd_abi() { return MPD_ABI; }

const char* mpd_instruction_set() { return active()->name; }

// Names of the instruction sets that this machine supports, best first, one per line.
const char* mpd_instruction_sets() {
  static char names[64];
  names[0] = 0;
  for (const InstructionSet& set : instruction_sets())
    if (set.supported) std::strcat(std::strcat(names, set.name), "\n");
  return names;
}

// For tests and benchmarks: activates another instruction set. Returns whether it is supported
// here.
int mpd_use_instruction_set(const char* name) {
  for (const InstructionSet& set : instruction_sets())
    if (set.supported && std::strcmp(set.name, name) == 0) {
      active() = &set;
      return 1;
    }
  return 0;
}

void mpd_fused_step(const MpdFusedStep* step) {
  const MpdFusedStepRange run = active()->fused_step;
  parallel_for_buckets(step->elements, step->threads,
                       [=](int64_t first, int64_t last) { run(step, first, last); });
}

void mpd_optimizer_range(const MpdOptimizer* optimizer, float* x, int64_t begin, int64_t end,
                         int64_t* segment, int ahead) {
  active()->optimizer(optimizer, x, begin, end, segment, ahead);
}

// For benchmarks: one MpdRooflinePass.
void mpd_roofline(const MpdFusedStep* step, int32_t pass, float* scratch) {
  const MpdRooflineRange run = active()->roofline;
  parallel_for_buckets(step->elements, step->threads,
                       [=](int64_t first, int64_t last) { run(step, pass, scratch, first, last); });
}
}
