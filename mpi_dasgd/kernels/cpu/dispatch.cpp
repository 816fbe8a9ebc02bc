// Chooses the instruction set when the program runs, and shares buckets out to threads.
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "lattice.h"

extern "C" {
void mpd_buckets_base(const MpdStep*, int64_t, int64_t);
#ifdef MPD_HAVE_AVX2
void mpd_buckets_avx2(const MpdStep*, int64_t, int64_t);
#endif
#ifdef MPD_HAVE_AVX512
void mpd_buckets_avx512(const MpdStep*, int64_t, int64_t);
#endif
}

namespace {

struct Set {
  const char* name;
  MpdBuckets buckets;
  bool runs;
};

// From the best to the one that always runs.
const std::vector<Set>& sets() {
  static const std::vector<Set> all = {
#ifdef MPD_HAVE_AVX512
      {"AVX-512", mpd_buckets_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd")},
#endif
#ifdef MPD_HAVE_AVX2
      {"AVX2", mpd_buckets_avx2, __builtin_cpu_supports("avx2") != 0},
#endif
#if defined(__SSE2__)
      {"SSE2", mpd_buckets_base, true},
#else
      {"portable", mpd_buckets_base, true},
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
  const int64_t buckets = (step->elements + 1023) / 1024;
  const MpdBuckets run = chosen()->buckets;
  const int64_t threads = step->threads < buckets ? step->threads : buckets;
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back(run, step, buckets * t / threads, buckets * (t + 1) / threads);
  if (buckets > 0) run(step, 0, threads > 1 ? buckets / threads : buckets);
  for (std::thread& other : others) other.join();
}
}
