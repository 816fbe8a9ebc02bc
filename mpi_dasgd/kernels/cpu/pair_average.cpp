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

constexpr int64_t kBlock = 1024;  // elements that stay in the L1 cache behind an optimizer's step
// Of a model that is streamed: a block's worth of such stores in a row would wait for each other,
// and its loads behind them.
constexpr int64_t kStreamed = 64;

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

// Asks for the elements of a vector a block further on: the hardware does not look ahead beyond a
// page.
template <typename T>
void ask(const T* vector) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kStreamed; i += kLine) __builtin_prefetch(vector + kBlock + i, 0, 3);
}

template <typename T>
struct Exchange {
  T* x;
  const T* const* deltas;
  int delta_count;
  const T* partner_model;
  T weight;
  T *reply_delta, *publication;

  // Does it on elements start .. start + count - 1, PART at most.
  template <int64_t PART, bool STREAMING>
  inline __attribute__((always_inline)) void run(int64_t start, int64_t count) const {
    alignas(64) T v[PART];
    alignas(64) T d[PART];
    if (STREAMING) {
      ask(x + start);
      for (int a = 0; a < delta_count; ++a) ask(deltas[a] + start);
      if (partner_model != nullptr) ask(partner_model + start);
    }
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
      if (reply_delta != nullptr) put(reply_delta + start, d, count, STREAMING);
    }
    if (delta_count > 0 || partner_model != nullptr) std::memcpy(x + start, v, count * sizeof(T));
    if (publication != nullptr) put(publication + start, v, count, STREAMING);
  }
};

// Does it on elements begin .. end - 1 of a vector of n.
template <typename T>
void pair_average(const Exchange<T>& exchange, int64_t n, int64_t begin, int64_t end,
                  const MpdOptimizer* optimizer) {
  const bool streaming = n * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  int64_t segment = -1;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = end - start < kBlock ? end : start + kBlock;
    if (optimizer != nullptr) update(*optimizer, exchange.x + start, start, stop, &segment);
    int64_t part = start;
    for (; streaming && part + kStreamed <= stop; part += kStreamed)
      exchange.template run<kStreamed, true>(part, kStreamed);
    if (part < stop) exchange.template run<kBlock, false>(part, stop - part);
  }
  if (streaming) stream_fence();
}

}  // namespace

extern "C" {

void mpd_pair_average_f32(float* x, int64_t n, const float* const* deltas, int delta_count,
                          const float* partner_model, double weight, float* reply_delta,
                          float* publication, const MpdOptimizer* optimizer, int threads) {
  const Exchange<float> exchange{
      x, deltas, delta_count, partner_model, static_cast<float>(weight), reply_delta, publication};
  parallel_for_buckets(n, threads, [=](int64_t first, int64_t last) {
    const int64_t end = last * MPD_BUCKET;
    pair_average(exchange, n, first * MPD_BUCKET, end < n ? end : n, optimizer);
  });
}

void mpd_pair_average_f64(double* x, int64_t n, const double* const* deltas, int delta_count,
                          const double* partner_model, double weight, double* reply_delta,
                          double* publication) {
  const Exchange<double> exchange{x,      deltas,      delta_count, partner_model,
                                  weight, reply_delta, publication};
  pair_average<double>(exchange, n, 0, n, nullptr);
}
}
