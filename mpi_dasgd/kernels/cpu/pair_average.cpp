// One pass over an unquantized model: absorbs deltas, averages with a partner, and writes the reply
// and the publication.
//
// A step of an optimizer comes first (float32), block by block. Then element by element, in this
// order, every operation rounded once (build with -ffp-contract=off):
//     v = x;  v = v + deltas[0];  v = v + deltas[1]; ...
//     d = weight * (partner_model - v);  v = v + d;  reply_delta = -d;
//     x = v;  publication = v
// pair_average_numpy of kernels/pair_average.py gives the same bits.
#include <cstdint>
#include <cstring>

#include "optimizer.h"
#include "parallel.h"
#include "streaming_store.h"

namespace {

constexpr int64_t kBlock = 1024;  // elements that stay in the L1 cache between two stages

template <typename T>
void put(T* out, const T* in, int64_t count, bool streaming) {
  if (streaming)
    stream(out, in, count * sizeof(T));
  else
    std::memcpy(out, in, count * sizeof(T));
}

void update(const MpdOptimizer& optimizer, float* x, int64_t begin, int64_t end, int64_t* segment) {
  mpd_optimizer_range(&optimizer, x, begin, end, segment, 1);
}
void update(const MpdOptimizer&, double*, int64_t, int64_t, int64_t*) {}  // there is none

// Elements begin .. end - 1 of a vector of n.
template <typename T>
void pair_average(T* x, int64_t n, int64_t begin, int64_t end, const T* const* deltas,
                  int delta_count, const T* partner_model, T weight, T* reply_delta, T* publication,
                  const MpdOptimizer* optimizer) {
  const bool streaming = n * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  int64_t segment = -1;
  alignas(64) T v[kBlock];
  alignas(64) T d[kBlock];
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = end - start < kBlock ? end - start : kBlock;
    if (optimizer != nullptr) update(*optimizer, x + start, start, start + count, &segment);
    std::memcpy(v, x + start, count * sizeof(T));
    for (int a = 0; a < delta_count; ++a) {
      const T* delta = deltas[a] + start;
      for (int64_t i = 0; i < count; ++i) v[i] += delta[i];
    }
    if (partner_model != nullptr) {
      const T* other = partner_model + start;
      for (int64_t i = 0; i < count; ++i) {
        const T move = weight * (other[i] - v[i]);
        v[i] += move;
        d[i] = -move;
      }
      if (reply_delta != nullptr) put(reply_delta + start, d, count, streaming);
    }
    if (delta_count > 0 || partner_model != nullptr) std::memcpy(x + start, v, count * sizeof(T));
    if (publication != nullptr) put(publication + start, v, count, streaming);
  }
  if (streaming) stream_fence();
}

}  // namespace

extern "C" {

void mpd_pair_average_f32(float* x, int64_t n, const float* const* deltas, int delta_count,
                          const float* partner_model, double weight, float* reply_delta,
                          float* publication, const MpdOptimizer* optimizer, int threads) {
  parallel_for_buckets(n, threads, [=](int64_t first, int64_t last) {
    const int64_t end = last * MPD_BUCKET;
    pair_average<float>(x, n, first * MPD_BUCKET, end < n ? end : n, deltas, delta_count,
                        partner_model, static_cast<float>(weight), reply_delta, publication,
                        optimizer);
  });
}

void mpd_pair_average_f64(double* x, int64_t n, const double* const* deltas, int delta_count,
                          const double* partner_model, double weight, double* reply_delta,
                          double* publication) {
  pair_average<double>(x, n, 0, n, deltas, delta_count, partner_model, weight, reply_delta,
                       publication, nullptr);
}
}
