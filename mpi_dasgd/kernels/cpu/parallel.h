// Distributes the buckets of a pass over threads.
#ifndef MPD_CPU_PARALLEL_H
#define MPD_CPU_PARALLEL_H
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "../layout.h"

constexpr int64_t kBucketsPerThread = 64;  // fewer take less time than the start of a thread

// Calls work(first, last) on ranges of buckets that together are all of a model, in at most
// `threads` threads; what a thread that cannot be started was to do is done here.
template <class Work>
void parallel_for_buckets(int64_t elements, int64_t threads, Work work) {
  const int64_t buckets = (elements + MPD_BUCKET - 1) / MPD_BUCKET;
  const int64_t most = buckets / kBucketsPerThread;
  if (threads > most) threads = most;
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) {
    const int64_t first = buckets * t / threads, last = buckets * (t + 1) / threads;
    try {
      others.emplace_back(work, first, last);
    } catch (const std::system_error&) {
      work(first, last);
    }
  }
  if (buckets > 0) work(0, threads > 1 ? buckets / threads : buckets);
  for (std::thread& other : others) other.join();
}

#endif
