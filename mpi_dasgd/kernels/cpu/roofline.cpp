// Roofline loops that `bench kernel` measures the lattice codec against: loops of the same memory
// traffic with almost no arithmetic, and the codec's work in separate passes over whole arrays,
// each as plain as in a typical library.
//
// Compiled once per instruction set with MPD_ISA naming it, as lattice.cpp is.
#include "roofline.h"

#include <cstring>

#include "encoded.h"
#include "streaming_store.h"

#define MPD_NAME2(isa) mpd_roofline_##isa
#define MPD_NAME(isa) MPD_NAME2(isa)

namespace {

const volatile float kZero = 0;  // unknown to the compiler; models are left unchanged

// --- the same memory traffic ---

// The state and the gradient of the optimizer of a step, which has one parameter.
struct State {
  float* __restrict first;
  float* __restrict second;
  const float* __restrict gradient;
};
State state_of(const MpdFusedStep& s, int64_t element) {
  if (s.optimizer == nullptr) return {};
  const MpdOptimizer& optimizer = *s.optimizer;
  float* second = optimizer.second == nullptr ? nullptr : optimizer.second + element;
  return {optimizer.first + element, second, optimizer.segments[0].gradient + element};
}

// One bucket: reads x, `IN` arrays of codes and, for an optimizer, `STATE` vectors of its state and
// the gradient; writes those of them that a step changes, and `OUT` arrays of codes.
template <int BITS, int IN, int OUT, int STATE>
void trivial(float* __restrict x, const State& state, const Code<BITS>* __restrict a,
             const Code<BITS>* __restrict b, Code<BITS>* __restrict p, Code<BITS>* __restrict q,
             float zero) {
  float* __restrict v = state.first, * __restrict w = state.second;
  const float* __restrict g = state.gradient;
  const auto element = [&](int j, int code) __attribute__((always_inline)) {
    float y = x[j];
    if (STATE > 0) {
      v[j] = v[j] + zero * g[j];
      y = y + zero * v[j];
    }
    if (STATE > 1) {
      w[j] = w[j] + zero * g[j];
      y = y + zero * w[j];
    }
    if (IN > 0) y = y + zero * static_cast<float>(code);
    if (IN > 0 || STATE > 0) x[j] = y;
    return static_cast<Code<BITS>>(mpd_bits(y));
  };
  constexpr int kRow =
      BITS == 4 ? 128 : kCodes<BITS>;  // 4 bits: elements 128 apart share a byte (layout.h)
  for (int row = 0; row < kCodes<BITS>; row += kRow)
#pragma omp simd
    for (int i = 0; i < kRow; ++i) {
      const int k = row + i;
      int code = IN > 0 ? a[k] : 0;
      if (IN > 1) code ^= b[k];
      Code<BITS> out;
      if (BITS == 4) {
        const Code<BITS> low = element(2 * row + i, code & 15);
        out = (low & 15) | element(2 * row + 128 + i, code >> 4) << 4;
      } else {
        out = element(k, code);
      }
      if (IN > 0) out = static_cast<Code<BITS>>(code ^ 1);
      if (OUT > 0) p[k] = out;
      if (OUT > 1) q[k] = out;
    }
}

template <int BITS, int IN, int OUT, int STATE>
void trivial(const MpdFusedStep& s, bool streaming, int64_t first, int64_t last) {
  const MpdEncodedVector* in[] = {s.partner_model != nullptr ? s.partner_model
                                  : IN > 0                   ? s.deltas[0]
                                                             : nullptr,
                                  IN > 1 ? s.deltas[0] : nullptr};
  const MpdEncodedVector* out[] = {s.reply_delta != nullptr ? s.reply_delta : s.publication,
                                   s.publication};
  alignas(64) Code<BITS> scratch[2][kCodes<BITS>];
  const float zero = kZero;
  for (int64_t b = first; b < last && (b + 1) * kBucket <= s.elements; ++b) {
    const State state = state_of(s, b * kBucket);
    const Code<BITS>* from[] = {IN > 0 ? codes_of<BITS>(*in[0], b) : nullptr,
                                IN > 1 ? codes_of<BITS>(*in[1], b) : nullptr};
    Code<BITS>* to[] = {OUT > 0 ? codes_of<BITS>(*out[0], b) : nullptr,
                        OUT > 1 ? codes_of<BITS>(*out[1], b) : nullptr};
    float* x = s.x + b * kBucket;
    if (streaming)
      trivial<BITS, IN, OUT, STATE>(x, state, from[0], from[1], scratch[0], scratch[1], zero);
    else
      trivial<BITS, IN, OUT, STATE>(x, state, from[0], from[1], to[0], to[1], zero);
    for (int i = 0; streaming && i < OUT; ++i) stream(to[i], scratch[i], sizeof scratch[i]);
  }
  if (streaming) stream_fence();
}

// The last bucket is left out if it is partly empty.
template <int BITS, int STATE>
void trivial(const MpdFusedStep& s, bool streaming, int64_t first, int64_t last) {
  const int in = (s.delta_count > 0) + (s.partner_model != nullptr);
  const int out = (s.reply_delta != nullptr) + (s.publication != nullptr);
  if (in == 2)
    trivial<BITS, 2, 2, STATE>(s, streaming, first, last);
  else if (in == 1 && out == 1)
    trivial<BITS, 1, 1, STATE>(s, streaming, first, last);
  else if (in == 1)
    trivial<BITS, 1, 0, STATE>(s, streaming, first, last);
  else if (out == 1)
    trivial<BITS, 0, 1, STATE>(s, streaming, first, last);
  else
    trivial<BITS, 0, 0, STATE>(s, streaming, first, last);
}

template <int BITS>
void trivial(const MpdFusedStep& s, bool streaming, int64_t first, int64_t last) {
  if (s.optimizer == nullptr)
    trivial<BITS, 0>(s, streaming, first, last);
  else if (s.optimizer->second == nullptr)
    trivial<BITS, 1>(s, streaming, first, last);
  else
    trivial<BITS, 2>(s, streaming, first, last);
}

// --- separate passes ---

// A publication as numbers, without verification. The anchor has the dither if the step exchanges.
template <int BITS>
void decode(const MpdFusedStep& s, int64_t b, float* __restrict out, int count) {
  alignas(64) Code<BITS> scratch[kBucket];
  const Code<BITS>* __restrict codes = unpack<BITS>(codes_of<BITS>(*s.partner_model, b), scratch);
  const float* __restrict y = s.x + b * kBucket;
  const float scale = s.partner_model->scales[b], inverse = mpd_inverse(scale);
  const uint32_t key = key_of(*s.partner_model, b);
  const auto element = [&](int j, uint32_t m) __attribute__((always_inline)) {
    const auto d = static_cast<uint32_t>(mpd_signed<BITS>(codes[j] - m));
    out[j] = mpd_mul(scale, mpd_value(m + d));
  };
  if (s.merge == 0 && !s.partner_model->nearest) {
#pragma omp simd
    for (int j = 0; j < count; ++j)
      element(j, mpd_round(mpd_add(mpd_mul(y[j], inverse), mpd_dither(kWeights.at[j], key))));
  } else {
#pragma omp simd
    for (int j = 0; j < count; ++j) element(j, mpd_round(mpd_mul(y[j], inverse)));
  }
}

void statistics(const MpdFusedStep& s, int64_t b, const float* __restrict other, int count) {
  const float* __restrict y = s.x + b * kBucket;
  float largest = 0, sum = 0;
#pragma omp simd reduction(max : largest) reduction(+ : sum)
  for (int j = 0; j < count; ++j) {
    const float distance = other[j] - y[j], square = distance * distance;
    largest = square > largest ? square : largest;
    sum += square;
  }
  const float unit = mpd_inverse(s.partner_model->scales[b] * s.partner_model->scales[b]);
  s.stats[b] = {0, static_cast<uint32_t>(largest * unit), static_cast<uint64_t>(sum * unit)};
}

template <int BITS>
void difference(const MpdFusedStep& s, int64_t b, const float* __restrict other, int count) {
  alignas(64) Code<BITS> delta_codes[kBucket] = {};
  const float* __restrict y = s.x + b * kBucket;
  const float scale = s.partner_model->scales[b], inverse = mpd_inverse(scale);
  const uint32_t key = key_of(*s.partner_model, b);
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const uint32_t m = mpd_round(mpd_add(mpd_mul(y[j], inverse), mpd_dither(kWeights.at[j], key)));
    delta_codes[j] = static_cast<Code<BITS>>(mpd_round(mpd_mul(other[j], inverse)) - m);
  }
  Code<BITS>* __restrict out = codes_of<BITS>(*s.reply_delta, b);
  if (BITS == 4)
    pack<BITS>(delta_codes, out);
  else
    std::memcpy(out, delta_codes, sizeof delta_codes);
  uint32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < kBucket * BITS / 32; ++k) {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(out) + 4 * k, 4);
    sum += word * kWeights.at[k];
  }
  s.reply_delta->scales[b] = -mpd_mul(s.weight, scale);
  s.reply_delta->checksums[b] =
      mpd_checksum(sum, s.reply_delta->scales[b], key_of(*s.reply_delta, b));
}

template <int BITS>
void move(const MpdFusedStep& s, int64_t b, int count) {
  alignas(64) Code<BITS> scratch[kBucket];
  const Code<BITS>* __restrict delta_codes =
      unpack<BITS>(codes_of<BITS>(*s.reply_delta, b), scratch);
  float* __restrict x = s.x + b * kBucket;
  const float unit = -s.reply_delta->scales[b];
#pragma omp simd
  for (int j = 0; j < count; ++j)
    x[j] = mpd_add(x[j], mpd_mul(unit, static_cast<float>(mpd_signed<BITS>(delta_codes[j]))));
}

void average(const MpdFusedStep& s, int64_t b, const float* __restrict other, int count) {
  float* __restrict x = s.x + b * kBucket;
#pragma omp simd
  for (int j = 0; j < count; ++j) x[j] = mpd_average(x[j], other[j], s.weight);
}

template <int BITS>
void run(const MpdFusedStep& s, int32_t pass, float* scratch, int64_t first, int64_t last) {
  if (pass == kTrivial || pass == kStreamed)
    return trivial<BITS>(s, pass == kStreamed, first, last);
  const int64_t begin = first * kBucket,
                end = last * kBucket < s.elements ? last * kBucket : s.elements;
  if (pass == kCopy) {
    std::memcpy(scratch + begin, s.x + begin, (end - begin) * sizeof(float));
  } else if (pass == kTriad) {
    const State state = state_of(s, 0);
    const float* __restrict v = state.first, * __restrict g = state.gradient;
    float* __restrict out = scratch;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) out[j] = v[j] + 3.0f * g[j];
  }
  for (int64_t b = first; b < last; ++b) {
    float* decoded = scratch + b * kBucket;
    const int64_t left = s.elements - b * kBucket;
    const int count = left < kBucket ? static_cast<int>(left) : kBucket;
    if (pass == kDecode) decode<BITS>(s, b, decoded, count);
    if (pass == kStatistics) statistics(s, b, decoded, count);
    if (pass == kDifference) difference<BITS>(s, b, decoded, count);
    if (pass == kMove) move<BITS>(s, b, count);
    if (pass == kAverage) average(s, b, decoded, count);
  }
}

}  // namespace

extern "C" void MPD_NAME(MPD_ISA)(const MpdFusedStep* step, int32_t pass, float* scratch,
                                  int64_t first, int64_t last) {
  switch (step->bits) {
    case 4:
      return run<4>(*step, pass, scratch, first, last);
    case 8:
      return run<8>(*step, pass, scratch, first, last);
    case 16:
      return run<16>(*step, pass, scratch, first, last);
  }
}
