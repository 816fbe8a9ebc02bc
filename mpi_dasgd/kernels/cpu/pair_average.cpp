// One pass over a model that absorbs deltas, averages with a partner, and writes reply and publication.
//
// Element by element, in this order, every operation rounded once (build with -ffp-contract=off):
//     v = x;  v = v + arrived[0];  v = v + arrived[1]; ...
//     d = weight * (theirs - v);  v = v + d;  reply = -d;
//     x = v;  published = v
// kernels/pair_average.py has the NumPy twin, which gives the same bits.
#include <cstdint>
#include <cstring>

#include "streaming_store.h"

namespace {

constexpr int64_t kBlock = 1024;  // elements that live in the L1 cache between two stages

template <typename T>
void put(T* out, const T* in, int64_t count, bool streaming) {
  if (streaming)
    stream(out, in, count * sizeof(T));
  else
    std::memcpy(out, in, count * sizeof(T));
}

template <typename T>
void pair_average(T* x, int64_t n, const T* const* arrived, int n_arrived, const T* theirs, T weight,
                  T* reply, T* published) {
  const bool streaming = n * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  alignas(64) T v[kBlock];
  alignas(64) T d[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    std::memcpy(v, x + start, count * sizeof(T));
    for (int a = 0; a < n_arrived; ++a) {
      const T* delta = arrived[a] + start;
      for (int64_t i = 0; i < count; ++i) v[i] += delta[i];
    }
    if (theirs != nullptr) {
      const T* other = theirs + start;
      for (int64_t i = 0; i < count; ++i) {
        const T moved = weight * (other[i] - v[i]);
        v[i] += moved;
        d[i] = -moved;
      }
      if (reply != nullptr) put(reply + start, d, count, streaming);
    }
    if (n_arrived > 0 || theirs != nullptr) std::memcpy(x + start, v, count * sizeof(T));
    if (published != nullptr) put(published + start, v, count, streaming);
  }
  if (streaming) stream_fence();
}

}  // namespace

extern "C" {

void mpd_pair_average_f32(float* x, int64_t n, const float* const* arrived, int n_arrived,
                          const float* theirs, double weight, float* reply, float* published) {
  pair_average<float>(x, n, arrived, n_arrived, theirs, static_cast<float>(weight), reply, published);
}

void mpd_pair_average_f64(double* x, int64_t n, const double* const* arrived, int n_arrived,
                          const double* theirs, double weight, double* reply, double* published) {
  pair_average<double>(x, n, arrived, n_arrived, theirs, weight, reply, published);
}
}
