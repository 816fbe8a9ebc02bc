// The lattice codec on the CPU, a bucket at a time: what a stage leaves the next one finds in the L1 cache, so
// that all stages together pass once over memory. A bucket's check is verified before anything is written.
//
// Compiled once for each instruction set with MPD_ISA naming it; dispatch.cpp chooses when the program runs.
#include <cstring>

#include "encoded.h"

#define MPD_NAME2(isa) mpd_buckets_##isa
#define MPD_NAME(isa) MPD_NAME2(isa)

namespace {

// mpd_weight of all positions.
struct Weights {
  uint32_t of[kBucket];
  static constexpr uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
  }
  constexpr Weights() : of() {
    for (uint32_t j = 0; j < kBucket; ++j)
      of[j] = (mix(j % 128 + 1u) | 1u) * (mix(j / 128 + 1001u) | 1u);
  }
};
alignas(64) constexpr Weights kWeights{};

// Elements that a loop below does side by side, each with sums of its own: enough to keep the processor busy.
#if defined(__AVX512F__)
constexpr int kLanes = 64;
#else
constexpr int kLanes = 32;
#endif

struct Sums {
  uint32_t of[kLanes] = {};
  uint32_t total() const {
    uint32_t all = 0;
    for (uint32_t sum : of) all += sum;
    return all;
  }
  uint32_t any() const {
    uint32_t all = 0;
    for (uint32_t bits : of) all |= bits;
    return all;
  }
};

// What the next bucket will read, asked for little by little while this one is computed: the hardware looks
// ahead within a page only, and a bucket is one.
struct Ahead {
  const char* model;  // null: a stage before has asked
  const char* codes;  // null: none
};

// Does body(j, lane) for all elements j of a bucket.
template <int BITS, class Body>
inline __attribute__((always_inline)) void each(const Ahead& ahead, Body body) {
  for (int first = 0; first < kBucket; first += kLanes) {
    if (ahead.model != nullptr)
      for (int o = 0; o < kLanes * 4; o += 64) __builtin_prefetch(ahead.model + first * 4 + o, 0, 2);
    if (ahead.codes != nullptr)
      for (int o = 0; o < kLanes * BITS / 8; o += 64)
        __builtin_prefetch(ahead.codes + first * BITS / 8 + o, 0, 2);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) body(first + lane, lane);
  }
}
#define MPD_BODY (int j, int lane) __attribute__((always_inline))

// Codes of a bucket, one an item whatever BITS is; two of 4 bits are packed in a byte where they are stored.
template <int BITS>
const Code<BITS>* unpack(const Code<BITS>* __restrict stored, Code<BITS>* __restrict room) {
  if (BITS != 4) return stored;
  for (int g = 0; g < 4; ++g)
    for (int i = 0; i < 128; ++i) {
      room[g * 256 + i] = stored[g * 128 + i] & 15;
      room[g * 256 + 128 + i] = stored[g * 128 + i] >> 4;
    }
  return room;
}
template <int BITS>
void pack(const Code<BITS>* codes, Code<BITS>* stored) {
  if (BITS != 4) return;  // written where they are stored
  for (int g = 0; g < 4; ++g)
    for (int i = 0; i < 128; ++i)
      stored[g * 128 + i] = (codes[g * 256 + i] & 15) | codes[g * 256 + 128 + i] << 4;
}

// mpd_signed of a code, in the narrowest type: four times as many fit in a register.
template <int BITS>
constexpr int kUnused = BITS == 4 ? 4 : 0;  // upper bits of the byte
template <int BITS>
inline int16_t narrow(Code<BITS> code) {
  if (BITS == 16) return static_cast<int16_t>(code);
  return static_cast<int8_t>(static_cast<uint8_t>(code << kUnused<BITS>)) >> kUnused<BITS>;
}

// x -> codes; returns the check.
template <int BITS, bool NEAREST>
uint32_t encode(const float* __restrict x, Code<BITS>* __restrict codes, float scale, uint32_t key,
                const Ahead& ahead) {
  const uint32_t* __restrict weight = kWeights.of;
  const float inverse = mpd_inverse(scale);
  Sums sum, strays;
  each<BITS>(ahead, [&] MPD_BODY {
    float t = mpd_mul(x[j], inverse);
    if (!NEAREST) t = mpd_add(t, mpd_dither(weight[j], key));
    const uint32_t z = mpd_round(t);
    strays.of[lane] |= mpd_stray(z);
    sum.of[lane] += mpd_fold<BITS>(z) * weight[j];
    codes[j] = static_cast<Code<BITS>>(z);
  });
  if (mpd_usable(scale) && mpd_in_range(strays.any())) return mpd_check(sum.total(), scale, key);
  std::memset(codes, 0, kBucket * sizeof *codes);  // every reader must reject it
  return ~mpd_check(0, scale, key);
}

// Codes of a publication against y -> the difference on the lattice; returns whether it is sound.
template <int BITS, bool NEAREST>
bool difference(const float* __restrict y, const Code<BITS>* __restrict codes, float scale,
                uint32_t key, uint32_t check, Code<BITS>* __restrict moved, const Ahead& ahead) {
  const uint32_t* __restrict weight = kWeights.of;
  const float inverse = mpd_inverse(scale);
  Sums sum, strays;
  each<BITS>(ahead, [&] MPD_BODY {
    float t = mpd_mul(y[j], inverse);
    if (!NEAREST) t = mpd_add(t, mpd_dither(weight[j], key));
    const uint32_t m = mpd_round(t);
    strays.of[lane] |= mpd_stray(m);
    const int d = mpd_signed<BITS>(codes[j] - m);
    sum.of[lane] += mpd_fold<BITS>(m + static_cast<uint32_t>(d)) * weight[j];
    moved[j] = static_cast<Code<BITS>>(d);
  });
  return mpd_usable(scale) && mpd_in_range(strays.any()) &&
         mpd_check(sum.total(), scale, key) == check;
}

// Weighted sum of the words of a bucket of a delta, for its check.
template <int BITS>
uint32_t sum_of_words(const Code<BITS>* stored) {
  uint32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < kBucket * BITS / 32; ++k) {
    uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(stored) + 4 * k, 4);
    sum += word * kWeights.of[k];
  }
  return sum;
}

// y + unit * d -> out, which may be y.
template <int BITS>
void move(const float* y, const Code<BITS>* __restrict moved, float unit, float* out,
          const Ahead& ahead) {
  each<BITS>(ahead, [&] MPD_BODY {
    (void)lane;
    out[j] = mpd_add(y[j], mpd_mul(unit, static_cast<float>(narrow<BITS>(moved[j]))));
  });
}

// What differences on the lattice say of the distance.
template <int BITS>
void note(const Code<BITS>* moved, bool sound, MpdFound* found) {
  if (found == nullptr) return;
  *found = {!sound, 0, 0};
  if (!sound) return;
  int16_t most = 0, least = 0;
  std::conditional_t<BITS == 16, int64_t, int32_t> sum = 0;
#pragma omp simd reduction(+ : sum) reduction(max : most) reduction(min : least)
  for (int j = 0; j < kBucket; ++j) {
    const int16_t d = narrow<BITS>(moved[j]);
    most = d > most ? d : most;
    least = d < least ? d : least;
    sum += d * d;
  }
  const uint32_t largest = static_cast<uint32_t>(most > -least ? most : -least);
  found->max_d2 = largest * largest;
  found->sum_d2 = static_cast<uint64_t>(sum);
}

// Plain average of y with the decoded publication -> out; returns whether it is sound.
template <int BITS, bool SUBTRACT>
bool merge(const float* __restrict y, const Code<BITS>* __restrict codes, float scale, uint32_t key,
           uint32_t check, float average, float* __restrict out, Code<BITS>* __restrict moved,
           const Ahead& ahead) {
  const uint32_t* __restrict weight = kWeights.of;
  const float inverse = mpd_inverse(scale);
  Sums sum, strays;
  each<BITS>(ahead, [&] MPD_BODY {
    const uint32_t m = mpd_round(mpd_mul(y[j], inverse));
    strays.of[lane] |= mpd_stray(m);
    const int d = mpd_signed<BITS>(codes[j] - m);
    const uint32_t z = m + static_cast<uint32_t>(d);
    sum.of[lane] += mpd_fold<BITS>(z) * weight[j];
    moved[j] = static_cast<Code<BITS>>(d);
    float decoded = mpd_value(z);
    if (SUBTRACT) decoded = mpd_sub(decoded, mpd_dither(weight[j], key));
    out[j] = mpd_average(y[j], mpd_mul(scale, decoded), average);
  });
  return mpd_usable(scale) && mpd_in_range(strays.any()) &&
         mpd_check(sum.total(), scale, key) == check;
}

// One step of SGD on `count` elements.
void sgd(float* __restrict x, float* __restrict velocity, const float* __restrict gradient,
         const MpdStep& step, int count, bool more) {
  for (int first = 0; first < count; first += kLanes) {
    if (more)
      for (int j = first; j < first + kLanes; j += 16) {
        __builtin_prefetch(x + kBucket + j, 1, 2);
        __builtin_prefetch(velocity + kBucket + j, 1, 2);
        __builtin_prefetch(gradient + kBucket + j, 0, 2);
      }
    const int last = first + kLanes < count ? first + kLanes : count;
#pragma omp simd
    for (int j = first; j < last; ++j) {
      const float direction = mpd_add(gradient[j], mpd_mul(step.decay, x[j]));
      velocity[j] = mpd_add(mpd_mul(step.momentum, velocity[j]), direction);
      x[j] = mpd_sub(x[j], mpd_mul(step.rate, velocity[j]));
    }
  }
}

// Applies one delta to `y`; returns where the result is, `out` or, if the bucket is rejected, `y`.
template <int BITS>
const float* apply(const float* y, const MpdMessage& delta, int64_t b, float* out,
                   MpdFound* found, Ahead ahead) {
  alignas(64) Code<BITS> room[kBucket];
  const float unit = delta.scales[b];
  const auto* stored = codes_of<BITS>(delta, b);
  const auto* moved = unpack<BITS>(stored, room);
  const bool sound =
      mpd_finite(unit) &&
      mpd_check(sum_of_words<BITS>(stored), unit, key_of(delta, b)) == delta.checks[b];
  note<BITS>(moved, sound, found);
  if (!sound) return y;
  move<BITS>(y, moved, unit, out, ahead);
  return out;
}

// Moves `y` towards a publication -> x, and writes the reply; returns whether it did.
template <int BITS>
bool exchange(const MpdStep& step, const float* y, int64_t b, float* x, Ahead ahead) {
  const MpdMessage& theirs = *step.theirs;
  alignas(64) Code<BITS> room[kBucket], local[kBucket];
  Code<BITS>* target = step.reply == nullptr ? local : codes_of<BITS>(*step.reply, b);
  Code<BITS>* moved = BITS == 4 ? local : target;
  const auto* codes = unpack<BITS>(codes_of<BITS>(theirs, b), room);
  const float scale = theirs.scales[b];
  const uint32_t key = key_of(theirs, b), check = theirs.checks[b];
  const bool sound = theirs.nearest
                         ? difference<BITS, true>(y, codes, scale, key, check, moved, ahead)
                         : difference<BITS, false>(y, codes, scale, key, check, moved, ahead);
  note<BITS>(moved, sound, step.found == nullptr ? nullptr : step.found + b);
  const float unit = sound ? mpd_mul(step.weight, scale) : 0;
  if (sound)
    move<BITS>(y, moved, unit, x, {});
  else
    std::memset(moved, 0, sizeof local);
  if (step.reply != nullptr) {
    const MpdMessage& reply = *step.reply;
    pack<BITS>(moved, target);
    reply.scales[b] = sound ? -unit : 0;
    reply.checks[b] = mpd_check(sum_of_words<BITS>(target), reply.scales[b], key_of(reply, b));
  }
  return sound;
}

// Averages `y` with a publication -> out; returns whether it did.
template <int BITS>
bool average(const MpdStep& step, const float* y, int64_t b, float* out, Ahead ahead) {
  const MpdMessage& theirs = *step.theirs;
  alignas(64) Code<BITS> room[kBucket], moved[kBucket];
  const auto* codes = unpack<BITS>(codes_of<BITS>(theirs, b), room);
  const float scale = theirs.scales[b];
  const uint32_t key = key_of(theirs, b), check = theirs.checks[b];
  const bool sound =
      step.merge == 2 && !theirs.nearest
          ? merge<BITS, true>(y, codes, scale, key, check, step.weight, out, moved, ahead)
          : merge<BITS, false>(y, codes, scale, key, check, step.weight, out, moved, ahead);
  note<BITS>(moved, sound, step.found == nullptr ? nullptr : step.found + b);
  return sound;
}

template <int BITS>
void publish(const MpdMessage& out, const float* x, int64_t b, Ahead ahead) {
  alignas(64) Code<BITS> local[kBucket];
  Code<BITS>* target = codes_of<BITS>(out, b);
  Code<BITS>* codes = BITS == 4 ? local : target;
  const float scale = out.scales[b];
  const uint32_t key = key_of(out, b);
  out.checks[b] = out.nearest ? encode<BITS, true>(x, codes, scale, key, ahead)
                              : encode<BITS, false>(x, codes, scale, key, ahead);
  pack<BITS>(codes, target);
}

// Does all stages on one bucket; `more` says whether a whole one follows.
template <int BITS>
void bucket(const MpdStep& step, int64_t b, float* x, int count, bool more) {
  alignas(64) float first[kBucket], second[kBucket];
  // The stage with the most arithmetic asks for the next bucket of the model.
  const char* model = more ? reinterpret_cast<const char*>(x + kBucket) : nullptr;
  const bool encodes = step.published != nullptr, meets = step.theirs != nullptr;
  const auto codes = [&](const MpdMessage* message) {
    return more ? reinterpret_cast<const char*>(codes_of<BITS>(*message, b + 1)) : nullptr;
  };
  if (step.velocity != nullptr)
    sgd(x, step.velocity + b * kBucket, step.gradient + b * kBucket, step, count, more);
  const float* y = x;  // where the model is now
  float* spare = first;
  for (int64_t a = 0; a < step.arrivals; ++a) {
    const Ahead ahead{encodes || meets || a > 0 ? nullptr : model, codes(step.arrived[a])};
    MpdFound* found = step.arrived_found == nullptr ? nullptr : step.arrived_found[a] + b;
    float* out = step.arrivals == 1 && !meets ? x : spare;
    y = apply<BITS>(y, *step.arrived[a], b, out, found, ahead);
    if (y == spare) spare = spare == first ? second : first;
  }
  if (meets) {
    const Ahead ahead{encodes ? nullptr : model, codes(step.theirs)};
    if (step.merge == 0) {
      if (exchange<BITS>(step, y, b, x, ahead)) y = x;
    } else {
      if (average<BITS>(step, y, b, spare, ahead)) y = spare;
    }
  }
  if (y != x) std::memcpy(x, y, sizeof first);
  if (encodes) publish<BITS>(*step.published, x, b, Ahead{model, nullptr});
}

template <int BITS>
void buckets(const MpdStep& step, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    float* x = step.x + b * kBucket;
    const int64_t left = step.elements - b * kBucket;
    if (left >= kBucket) {
      bucket<BITS>(step, b, x, kBucket, left >= 2 * kBucket);
    } else {
      // Zeros behind the end have code 0 and add nothing that a receiver does not add.
      alignas(64) float padded[kBucket] = {};
      std::memcpy(padded, x, left * sizeof(float));
      bucket<BITS>(step, b, padded, static_cast<int>(left), false);
      std::memcpy(x, padded, left * sizeof(float));
    }
  }
}

}  // namespace

extern "C" void MPD_NAME(MPD_ISA)(const MpdStep* step, int64_t first, int64_t last) {
  switch (step->bits) {
    case 4:
      return buckets<4>(*step, first, last);
    case 8:
      return buckets<8>(*step, first, last);
    case 16:
      return buckets<16>(*step, first, last);
  }
}
