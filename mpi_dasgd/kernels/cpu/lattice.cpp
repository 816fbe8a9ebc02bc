// The lattice codec on the CPU, one bucket at a time: each stage leaves its result in the L1 cache
// for the next one, so that all stages together pass once over memory. A bucket's checksum is
// verified before anything is written.
//
// Compiled once per instruction set with MPD_ISA naming it; dispatch.cpp chooses at run time.
#include <cstring>

#include "byte_codes.h"
#include "encoded.h"
#include "optimizer.h"
#include "prefetch.h"

#define MPD_NAME2(name, isa) mpd_##name##_##isa
#define MPD_NAME(name, isa) MPD_NAME2(name, isa)

extern "C" void MPD_NAME(optimizer, MPD_ISA)(const MpdOptimizer*, float* x, int64_t begin,
                                             int64_t end, int64_t* segment, int ahead);

namespace {

// Elements that a loop below processes side by side, each lane with its own sums: enough to keep
// the processor busy.
#if defined(__AVX512F__)
constexpr int kLanes = 64;
#else
constexpr int kLanes = 32;
#endif

// An accumulator per lane.
struct LaneSums {
  uint32_t lane[kLanes] = {};
  uint32_t total() const {
    uint32_t all = 0;
    for (uint32_t sum : lane) all += sum;
    return all;
  }
  uint32_t any() const {
    uint32_t all = 0;
    for (uint32_t bits : lane) all |= bits;
    return all;
  }
};

// Calls body(j, lane) for all elements j of a bucket; lane = j mod kLanes.
//
// `#pragma omp simd` vectorizes the inner loop only if nothing in it is a call, and the body is too
// long for the compiler to inline it of its own accord, so the lambda must be always_inline. An
// attribute of a lambda stands between its parameters and its body; MPD_BODY is this piece, the
// same for all bodies:
//
//     for_each_element<BITS>(prefetch, [&] MPD_BODY { out[j] = ...; });
template <int BITS, class Body>
inline __attribute__((always_inline)) void for_each_element(const Prefetch& prefetch, Body body) {
  for (int first = 0; first < kBucket; first += kLanes) {
    prefetch.ask<BITS, kLanes>(first);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) body(first + lane, lane);
  }
}
#define MPD_BODY (int j, [[maybe_unused]] int lane) __attribute__((always_inline))

// mpd_signed of a code, in the narrowest type: four times as many fit in a register.
template <int BITS>
constexpr int kUnusedBits = BITS == 4 ? 4 : 0;  // upper bits of the byte
template <int BITS>
inline int16_t narrow(Code<BITS> code) {
  if (BITS == 16) return static_cast<int16_t>(code);
  return static_cast<int8_t>(static_cast<uint8_t>(code << kUnusedBits<BITS>)) >> kUnusedBits<BITS>;
}

// x -> codes; returns the checksum.
template <int BITS, bool NEAREST>
uint32_t encode(const float* __restrict x, float scale, uint32_t key, Code<BITS>* __restrict codes,
                const Prefetch& prefetch) {
  const uint32_t* __restrict weight = kWeights.at;
  const float inverse = mpd_inverse(scale);
  LaneSums sum, range_bits;
  for_each_element<BITS>(prefetch, [&] MPD_BODY {
    float t = mpd_mul(x[j], inverse);
    if (!NEAREST) t = mpd_add(t, mpd_dither(weight[j], key));
    const uint32_t z = mpd_round(t);
    range_bits.lane[lane] |= mpd_range_bits(z);
    sum.lane[lane] += mpd_fold<BITS>(z) * weight[j];
    codes[j] = static_cast<Code<BITS>>(z);
  });
  if (mpd_scale_ok(scale) && mpd_in_range(range_bits.any()))
    return mpd_checksum(sum.total(), scale, key);
  std::memset(codes, 0, kBucket * sizeof *codes);  // every reader must reject it
  return ~mpd_checksum(0, scale, key);
}

// Whether the points that were decoded from a bucket are those that were published.
template <int BITS>
inline bool is_valid(const BucketView<BITS>& bucket, const LaneSums& sum,
                     const LaneSums& range_bits) {
  return mpd_scale_ok(bucket.scale) && mpd_in_range(range_bits.any()) &&
         mpd_checksum(sum.total(), bucket.scale, bucket.key) == bucket.checksum;
}

// Codes of a publication against y -> their difference on the lattice; returns whether it is valid.
template <int BITS, bool NEAREST>
bool difference(const float* __restrict y, const BucketView<BITS>& bucket,
                Code<BITS>* __restrict delta_codes, const Prefetch& prefetch) {
  const uint32_t* __restrict weight = kWeights.at;
  const Code<BITS>* __restrict codes = bucket.codes;
  const float inverse = mpd_inverse(bucket.scale);
  const uint32_t key = bucket.key;
  LaneSums sum, range_bits;
  for_each_element<BITS>(prefetch, [&] MPD_BODY {
    float t = mpd_mul(y[j], inverse);
    if (!NEAREST) t = mpd_add(t, mpd_dither(weight[j], key));
    const uint32_t m = mpd_round(t);
    range_bits.lane[lane] |= mpd_range_bits(m);
    const int d = mpd_signed<BITS>(codes[j] - m);
    sum.lane[lane] += mpd_fold<BITS>(m + static_cast<uint32_t>(d)) * weight[j];
    delta_codes[j] = static_cast<Code<BITS>>(d);
  });
  return is_valid(bucket, sum, range_bits);
}

// Weighted sum of the 32-bit words of a bucket of a delta, for its checksum.
template <int BITS>
uint32_t sum_of_words(const Code<BITS>* stored) {
  uint32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < kBucket * BITS / 32; ++k) {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(stored) + 4 * k, 4);
    sum += word * kWeights.at[k];
  }
  return sum;
}

// y + unit * d -> out, which may be y.
template <int BITS>
void move(const float* y, const Code<BITS>* __restrict delta_codes, float unit, float* out,
          const Prefetch& prefetch) {
  for_each_element<BITS>(prefetch, [&] MPD_BODY {
    out[j] = mpd_add(y[j], mpd_mul(unit, static_cast<float>(narrow<BITS>(delta_codes[j]))));
  });
}

// Writes the statistics of the differences on the lattice, if there is a place for them.
template <int BITS>
void write_stats(const Code<BITS>* delta_codes, bool valid, MpdBucketStats* stats) {
  if (stats == nullptr) return;
  *stats = {!valid, 0, 0};
  if (!valid) return;
  int16_t most = 0, least = 0;
  std::conditional_t<BITS == 16, int64_t, int32_t> sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most) reduction(min : least)
  for (int j = 0; j < kBucket; ++j) {
    const int16_t d = narrow<BITS>(delta_codes[j]);
    most = d > most ? d : most;
    least = d < least ? d : least;
    sum += d * d;
  }
  const uint32_t largest = static_cast<uint32_t>(most > -least ? most : -least);
  stats->max_d2 = largest * largest;
  stats->sum_d2 = static_cast<uint64_t>(sum);
}

// Plain average of y with the decoded publication -> out; returns whether it is valid.
template <int BITS, bool SUBTRACT>
bool merge(const float* __restrict y, const BucketView<BITS>& bucket, float share,
           float* __restrict out, Code<BITS>* __restrict delta_codes, const Prefetch& prefetch) {
  const uint32_t* __restrict weight = kWeights.at;
  const Code<BITS>* __restrict codes = bucket.codes;
  const float scale = bucket.scale, inverse = mpd_inverse(scale);
  const uint32_t key = bucket.key;
  LaneSums sum, range_bits;
  for_each_element<BITS>(prefetch, [&] MPD_BODY {
    const uint32_t m = mpd_round(mpd_mul(y[j], inverse));
    range_bits.lane[lane] |= mpd_range_bits(m);
    const int d = mpd_signed<BITS>(codes[j] - m);
    const uint32_t z = m + static_cast<uint32_t>(d);
    sum.lane[lane] += mpd_fold<BITS>(z) * weight[j];
    delta_codes[j] = static_cast<Code<BITS>>(d);
    float decoded = mpd_value(z);
    if (SUBTRACT) decoded = mpd_sub(decoded, mpd_dither(weight[j], key));
    out[j] = mpd_average(y[j], mpd_mul(scale, decoded), share);
  });
  return is_valid(bucket, sum, range_bits);
}

// --- stages of a step, on one bucket ---

// What the next bucket will read, shared out among the stages of this one that compute most.
struct Prefetches {
  Prefetch average, publish;
};

void write(MpdBucketStats* stats, int64_t b, bool valid, const MpdBucketStats& value) {
  if (stats != nullptr) stats[b] = valid ? value : MpdBucketStats{1, 0, 0};
}

// Applies one delta to `y`; returns where the result is: `out`, or `y` if the bucket is rejected.
template <int BITS>
const float* apply(const float* y, const MpdEncodedVector& delta, int64_t b, float* out,
                   MpdBucketStats* stats, const Prefetch& prefetch) {
  alignas(64) Code<BITS> scratch[kBucket];
  const float unit = delta.scales[b];
  const auto* stored = codes_of<BITS>(delta, b);
  const auto is_valid = [&](uint32_t sum) {
    return mpd_finite(unit) && mpd_checksum(sum, unit, key_of(delta, b)) == delta.checksums[b];
  };
  if constexpr (BITS == 16) {
    const bool valid = is_valid(sum_of_words<BITS>(stored));
    write_stats<BITS>(stored, valid, stats == nullptr ? nullptr : stats + b);
    if (!valid) return y;
    move<BITS>(y, stored, unit, out, prefetch);
  } else {
    const uint8_t* differences = signed_bytes<BITS>(stored, scratch);
    const ByteTally tally = tally_of(differences);
    const bool valid = is_valid(BITS == 8 ? tally.sum_of_words() : sum_of_words<BITS>(stored));
    write(stats, b, valid, tally.stats());
    if (!valid) return y;
    move_bytes<BITS>(y, differences, unit, out, prefetch);
  }
  return out;
}

// A move of an exchange that is still to be made: y + unit * d.
template <int BITS>
struct Move {
  const Code<BITS>* differences;
  float unit;
};

// Whether the codes of a vector, which other cores read next, are stored past the caches.
template <int BITS>
bool is_streamed(const MpdEncodedVector& vector, int64_t elements) {
  return BITS == 8 && elements > kStreamCodes &&
         reinterpret_cast<uintptr_t>(vector.codes) % kRegister == 0;
}

// Compares `y` with a publication, writes the reply, and returns the move that is left to make;
// without differences if the bucket is rejected. `local` may hold them.
template <int BITS>
Move<BITS> exchange(const MpdFusedStep& step, const float* y, int64_t b,
                    Code<BITS>* __restrict local, const Prefetch& prefetch) {
  const MpdEncodedVector& partner_model = *step.partner_model;
  alignas(64) Code<BITS> scratch[kBucket];
  Code<BITS>* target = step.reply_delta == nullptr ? local : codes_of<BITS>(*step.reply_delta, b);
  const bool streaming =
      step.reply_delta != nullptr && is_streamed<BITS>(*step.reply_delta, step.elements);
  Code<BITS>* differences = BITS == 4 || streaming ? local : target;
  const auto bucket = view_of<BITS>(partner_model, b, scratch);
  bool valid;
  uint32_t sum = 0;
  if constexpr (BITS == 16) {
    valid = partner_model.nearest ? difference<BITS, true>(y, bucket, differences, prefetch)
                                  : difference<BITS, false>(y, bucket, differences, prefetch);
    write_stats<BITS>(differences, valid, step.stats == nullptr ? nullptr : step.stats + b);
  } else {
    ByteTally tally;
    const auto run =
        partner_model.nearest ? difference_bytes<BITS, true> : difference_bytes<BITS, false>;
    valid = run(y, bucket, differences, streaming ? target : nullptr, tally, prefetch);
    write(step.stats, b, valid, tally.stats());
    sum = tally.sum_of_words();
  }
  const float unit = valid ? mpd_mul(step.weight, bucket.scale) : 0;
  if (step.reply_delta != nullptr) {
    const MpdEncodedVector& reply = *step.reply_delta;
    if (valid) {
      pack<BITS>(differences, target);
    } else {
      if (streaming) stream_fence();
      std::memset(target, 0, kCodes<BITS> * sizeof *target);
    }
    if (BITS != 8) sum = sum_of_words<BITS>(target);
    reply.scales[b] = valid ? -unit : 0;
    reply.checksums[b] = mpd_checksum(valid ? sum : 0, reply.scales[b], key_of(reply, b));
  }
  return {valid ? differences : nullptr, unit};
}

// Averages `y` with a publication -> out; returns whether it did.
template <int BITS>
bool average(const MpdFusedStep& step, const float* y, int64_t b, float* out,
             const Prefetch& prefetch) {
  const MpdEncodedVector& partner_model = *step.partner_model;
  alignas(64) Code<BITS> scratch[kBucket], differences[kBucket];
  const auto bucket = view_of<BITS>(partner_model, b, scratch);
  const bool valid = step.merge == 2 && !partner_model.nearest
                         ? merge<BITS, true>(y, bucket, step.weight, out, differences, prefetch)
                         : merge<BITS, false>(y, bucket, step.weight, out, differences, prefetch);
  write_stats<BITS>(differences, valid, step.stats == nullptr ? nullptr : step.stats + b);
  return valid;
}

// Makes a move that is left, y -> x; without one x is y.
template <int BITS>
void make(const Move<BITS>& left, const float* y, float* x, const Prefetch& prefetch) {
  if (left.differences == nullptr) return;
  if constexpr (BITS == 16)
    move<BITS>(y, left.differences, left.unit, x, prefetch);
  else
    move_bytes<BITS>(y, left.differences, left.unit, x, prefetch);
}

// Makes a move that is left, and publishes the result.
template <int BITS>
void publish(const MpdFusedStep& step, const Move<BITS>& left, const float* y, float* x, int64_t b,
             const Prefetch& prefetch) {
  const MpdEncodedVector& out = *step.publication;
  alignas(64) Code<BITS> local[kBucket];
  Code<BITS>* target = codes_of<BITS>(out, b);
  Code<BITS>* codes = BITS == 4 ? local : target;
  const float scale = out.scales[b];
  const uint32_t key = key_of(out, b);
  if constexpr (BITS == 16) {
    make<BITS>(left, y, x, {});
    out.checksums[b] = out.nearest ? encode<BITS, true>(x, scale, key, codes, prefetch)
                                   : encode<BITS, false>(x, scale, key, codes, prefetch);
  } else {
    const auto run =
        left.differences != nullptr
            ? (out.nearest ? encode_bytes<BITS, true, true> : encode_bytes<BITS, false, true>)
            : (out.nearest ? encode_bytes<BITS, true, false> : encode_bytes<BITS, false, false>);
    out.checksums[b] = run(y, left.differences, left.unit, x, scale, key, codes,
                           is_streamed<BITS>(out, step.elements), prefetch);
  }
  pack<BITS>(codes, target);
}

// Whether the optimizer's stage itself asks for what it will read of the next bucket: it is alone, or
// computes long (Adam's divisions). That of SGD would wait, while other stages have the time.
bool optimizer_asks(const MpdFusedStep& step) {
  const bool alone =
      step.delta_count == 0 && step.partner_model == nullptr && step.publication == nullptr;
  return alone || step.optimizer->second != nullptr;
}

// Returns what the stages of bucket b are to ask for, of a whole bucket that follows.
template <int BITS>
Prefetches plan(const MpdFusedStep& step, int64_t b, const float* x, int64_t segment) {
  Prefetches plan;
  const bool averages = step.partner_model != nullptr, publishes = step.publication != nullptr;
  Prefetch& first = averages ? plan.average : plan.publish;
  Prefetch& second = publishes ? plan.publish : plan.average;
  if (averages) first.add_codes(codes_of<BITS>(*step.partner_model, b + 1));
  if (step.delta_count > 0) second.add_codes(codes_of<BITS>(*step.deltas[0], b + 1));
  if (step.optimizer == nullptr || !optimizer_asks(step)) second.add_floats(x + kBucket);
  if (step.optimizer != nullptr && !optimizer_asks(step)) {
    const MpdOptimizer& optimizer = *step.optimizer;
    const int64_t next = (b + 1) * kBucket;
    first.add_floats(gradient_at(optimizer, segment, next));
    if (optimizer.first != nullptr) second.add_floats(optimizer.first + next);
    if (optimizer.second != nullptr) first.add_floats(optimizer.second + next);
    if (optimizer.third != nullptr) first.add_floats(optimizer.third + next);
  }
  return plan;
}

// Does all stages on one bucket; `has_next` says whether a whole bucket follows, and `segment` is
// the optimizer's.
template <int BITS>
void bucket(const MpdFusedStep& step, int64_t b, float* x, int count, bool has_next,
            int64_t* segment) {
  alignas(64) float first[kBucket], second[kBucket];
  alignas(64) Code<BITS> local[kBucket];
  const bool publishes = step.publication != nullptr, averages = step.partner_model != nullptr;

  // Make the optimizer's step
  if (step.optimizer != nullptr)
    MPD_NAME(optimizer, MPD_ISA)(step.optimizer, x, b * kBucket, b * kBucket + count, segment,
                                 optimizer_asks(step));
  const Prefetches ahead = has_next ? plan<BITS>(step, b, x, *segment) : Prefetches{};

  // Absorb the deltas: each reads the model at y and writes it to x or to the spare buffer
  const float* y = x;
  float* spare = first;
  for (int64_t a = 0; a < step.delta_count; ++a) {
    Prefetch prefetch;
    if (has_next && a > 0) prefetch.add_codes(codes_of<BITS>(*step.deltas[a], b + 1));
    MpdBucketStats* stats = step.delta_stats == nullptr ? nullptr : step.delta_stats[a];
    float* out = step.delta_count == 1 && !averages ? x : spare;
    const bool computes_most = a == 0 && !averages && !publishes;
    y = apply<BITS>(y, *step.deltas[a], b, out, stats, computes_most ? ahead.publish : prefetch);
    if (y == spare) spare = spare == first ? second : first;
  }

  // Exchange or merge with the partner's model
  Move<BITS> left{nullptr, 0};
  if (averages && step.merge == 0)
    left = exchange<BITS>(step, y, b, local, ahead.average);
  else if (averages && average<BITS>(step, y, b, spare, ahead.average))
    y = spare;

  // Store the model, and publish it
  if (left.differences == nullptr && y != x) {
    std::memcpy(x, y, sizeof first);
    y = x;
  }
  if (publishes)
    publish<BITS>(step, left, y, x, b, ahead.publish);
  else
    make<BITS>(left, y, x, {});
}

template <int BITS>
void buckets(const MpdFusedStep& step, int64_t first, int64_t last) {
  int64_t segment = -1;
  for (int64_t b = first; b < last; ++b) {
    float* x = step.x + b * kBucket;
    const int64_t left = step.elements - b * kBucket;
    if (left >= kBucket) {
      bucket<BITS>(step, b, x, kBucket, left >= 2 * kBucket, &segment);
    } else {
      // Zeros behind the end have code 0, and add nothing that a receiver does not add.
      alignas(64) float padded[kBucket] = {};
      std::memcpy(padded, x, left * sizeof(float));
      bucket<BITS>(step, b, padded, static_cast<int>(left), false, &segment);
      std::memcpy(x, padded, left * sizeof(float));
    }
  }
  if (BITS == 8 && step.elements > kStreamCodes) stream_fence();
}

}  // namespace

extern "C" void MPD_NAME(fused_step, MPD_ISA)(const MpdFusedStep* step, int64_t first,
                                              int64_t last) {
  switch (step->bits) {
    case 4:
      return buckets<4>(*step, first, last);
    case 8:
      return buckets<8>(*step, first, last);
    case 16:
      return buckets<16>(*step, first, last);
  }
}
