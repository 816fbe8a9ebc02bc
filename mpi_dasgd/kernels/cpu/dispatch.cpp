// Chooses the instruction set when the program runs, and shares buckets out to threads.
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "fused_step.h"
#include "roofline.h"

#define MPD_DECLARE(isa)                                                                 \
  extern "C" void mpd_buckets_##isa(const MpdStep*, int64_t first, int64_t last);        \
  extern "C" void mpd_yardstick_##isa(const MpdStep*, int32_t pass, float* room, int64_t first, \
                                      int64_t last);
MPD_DECLARE(base)
#ifdef MPD_HAVE_AVX2
MPD_DECLARE(avx2)
#endif
#ifdef MPD_HAVE_AVX512
MPD_DECLARE(avx512)
#endif

namespace {

struct Set {
  const char* name;
  MpdBuckets buckets;
  MpdYardstick yardstick;
  bool runs;
};

// From the best to the one that always runs.
const std::vector<Set>& sets() {
  static const std::vector<Set> all = {
#ifdef MPD_HAVE_AVX512
      {"AVX-512", mpd_buckets_avx512, mpd_yardstick_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd")},
#endif
#ifdef MPD_HAVE_AVX2
      {"AVX2", mpd_buckets_avx2, mpd_yardstick_avx2, __builtin_cpu_supports("avx2") != 0},
#endif
#if defined(__SSE2__)
      {"SSE2", mpd_buckets_base, mpd_yardstick_base, true},
#else
      {"portable", mpd_buckets_base, mpd_yardstick_base, true},
#endif
  };
  return all;
}

const Set*& chosen() {
  static const Set* set = [] {
    for (const Set& candidate : sets())
      if (candidate.runs) return &candidate;
    return static_cast<const Set*>(nullptr);
  }();
  return set;
}

// Does work(first, last) for all buckets of a step, shared out to its threads.
template <class Work>
void share(const MpdStep& step, Work work) {
  const int64_t buckets = (step.elements + 1023) / 1024;
  const int64_t threads = step.threads < buckets ? step.threads : buckets;
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back(work, buckets * t / threads, buckets * (t + 1) / threads);
  if (buckets > 0) work(0, threads > 1 ? buckets / threads : buckets);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

const char* mpd_instruction_set() { return chosen()->name; }

// Names of what this machine can run, best first, one a line.
const char* mpd_instruction_sets() {
  static char names[64];
  names[0] = 0;
  for (const Set& set : sets())
    if (set.runs) std::strcat(std::strcat(names, set.name), "\n");
  return names;
}

// For tests: use another one. Returns whether it can run here.
int mpd_use_instruction_set(const char* name) {
  for (const Set& set : sets())
    if (set.runs && std::strcmp(set.name, name) == 0) {
      chosen() = &set;
      return 1;
    }
  return 0;
}

void mpd_lattice_step(const MpdStep* step) {
  const MpdBuckets run = chosen()->buckets;
  share(*step, [=](int64_t first, int64_t last) { run(step, first, last); });
}

// For benchmarks: a pass of yardstick.h.
void mpd_yardstick(const MpdStep* step, int32_t pass, float* room) {
  const MpdYardstick run = chosen()->yardstick;
  share(*step, [=](int64_t first, int64_t last) { run(step, pass, room, first, last); });
}
}
