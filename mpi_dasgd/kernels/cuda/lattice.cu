// The lattice codec on a GPU. A warp owns a bucket, whose elements are in its lanes' registers from the load to
// the store: all stages together pass once over memory, and a check is verified before anything is written.
// No shared memory, no barriers, no atomics; the size of the grid does not show in the results.
#include "lane.h"

#define MPD_ARRIVALS 4

// As in cpu/lattice.h, but passed by value; Python mirrors them in kernels/cuda/__init__.py.
struct MpdMessage {
  void* codes;  // null: there is no such message
  float* scales;
  mpd_u32* checks;
  mpd_u64 seed;
  long long nearest;
};

struct MpdFound {
  mpd_u32 rejected, max_d2;
  mpd_u64 sum_d2;
};

struct MpdStep {
  float* x;
  long long elements;
  MpdMessage theirs, reply, published;
  MpdMessage arrived[MPD_ARRIVALS];
  MpdFound* arrived_found[MPD_ARRIVALS];
  MpdFound* found;
  float* velocity;
  const float* gradient;
  float weight, rate, momentum, decay;
  int arrivals, subtract;
};

// What a kernel can do; the rest is not compiled into it.
enum Part { kSgd = 1, kApply = 2, kAbsorb = 4, kExchange = 8, kMerge = 16, kPublish = 32 };

MPD_DEVICE mpd_u32 larger(mpd_u32 a, mpd_u32 b) { return a > b ? a : b; }

MPD_DEVICE mpd_u32 key_of(const MpdMessage& message, long long bucket) {
  return mpd_key(message.seed, static_cast<mpd_u64>(bucket));
}

// What a rounded bucket is judged by: a sum for its check, and whether it went out of range.
struct Rounded {
  mpd_u32 sum = 0, strays = 0;
};

MPD_DEVICE float dither(const Weights& weights, int k, int i, mpd_u32 key) {
  return mpd_dither(weights.low[i] * mpd_weight_high(k), key);
}

template <bool DITHER>
MPD_DEVICE mpd_u32 point_of(float t, const Weights& weights, int k, int i, mpd_u32 key, Rounded& rounded) {
  if (DITHER) t = mpd_add(t, dither(weights, k, i, key));
  const mpd_u32 point = mpd_round(t);
  rounded.strays |= mpd_stray(point);
  return point;
}

template <int BITS, bool DITHER>
MPD_DEVICE Rounded encode(const Elements& x, float inverse, mpd_u32 key, const Weights& weights,
                          Codes<BITS>& codes) {
  Rounded rounded;
  clear<BITS>(codes);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mpd_u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const mpd_u32 z = point_of<DITHER>(mpd_mul(x[k][i], inverse), weights, k, i, key, rounded);
      sum += mpd_fold<BITS>(z) * weights.low[i];
      put<BITS>(codes, k, i, z);
    }
    rounded.sum += sum * mpd_weight_high(k);
  }
  return rounded;
}

// Codes of a publication against y -> their differences on the lattice, in the same place. Does each(k, i, z).
template <int BITS, bool DITHER, class Each>
MPD_DEVICE Rounded difference(const Elements& y, float inverse, mpd_u32 key, const Weights& weights,
                              Codes<BITS>& codes, Each each) {
  Rounded rounded;
  Codes<BITS> moves;
  clear<BITS>(moves);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mpd_u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const mpd_u32 m = point_of<DITHER>(mpd_mul(y[k][i], inverse), weights, k, i, key, rounded);
      const mpd_u32 d = static_cast<mpd_u32>(mpd_signed<BITS>(get<BITS>(codes, k, i) - m));
      sum += mpd_fold<BITS>(m + d) * weights.low[i];
      put<BITS>(moves, k, i, d);
      each(k, i, m + d);
    }
    rounded.sum += sum * mpd_weight_high(k);
  }
#pragma unroll
  for (int w = 0; w < BITS; ++w) codes[w] = moves[w];
  return rounded;
}

// Weighted sum of the words of a bucket of a delta, for its check.
template <int BITS>
MPD_DEVICE mpd_u32 sum_of_words(const Codes<BITS>& moves, const Weights& weights) {
  mpd_u32 sum = 0;
#pragma unroll
  for (int w = 0; w < BITS; ++w) sum += moves[w] * weights.word[w % 4] * mpd_weight_high(w / 4);
  return warp_sum(sum);
}

template <int BITS>
MPD_DEVICE void move(Elements& y, float unit, const Codes<BITS>& moves) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = mpd_signed<BITS>(get<BITS>(moves, k, i));
      y[k][i] = mpd_add(y[k][i], mpd_mul(unit, static_cast<float>(d)));
    }
}

// What differences on the lattice say of the distance.
template <int BITS>
MPD_DEVICE void note(MpdFound* found, long long bucket, bool sound, const Codes<BITS>& moves) {
  if (found == nullptr) return;
  mpd_u32 largest = 0, low = 0;
  mpd_u64 sum = 0;
  if (sound) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = mpd_signed<BITS>(get<BITS>(moves, k, i));
        const mpd_u32 square = static_cast<mpd_u32>(d * d);
        largest = larger(largest, square);
        if (BITS == 16)
          sum += square;
        else
          low += square;
      }
    largest = warp_max(largest);
    if (BITS == 16) {  // in two parts, neither of which can overflow
      low = static_cast<mpd_u32>(sum) & 0xffffffu;
      sum = static_cast<mpd_u64>(warp_sum(static_cast<mpd_u32>(sum >> 24))) << 24;
    }
    sum += warp_sum(low);
  }
  if (lane() == 0) found[bucket] = {!sound, largest, sum};
}

// The stages, for one bucket. Those that move y return whether they did.

// In halves: a whole bucket of three vectors does not fit into the registers.
MPD_DEVICE bool sgd(const MpdStep& step, long long bucket, long long left, Elements& y) {
#pragma unroll
  for (int half = 0; half < 2; ++half, left -= MPD_BUCKET / 2) {
    const long long first = bucket * MPD_BUCKET + half * (MPD_BUCKET / 2);
    float velocity[4][4], gradient[4][4];
    load(velocity, step.velocity + first, left);
    load(gradient, step.gradient + first, left);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = y[half * 4 + k][i];
        const float direction = mpd_add(gradient[k][i], mpd_mul(step.decay, x));
        velocity[k][i] = mpd_add(mpd_mul(step.momentum, velocity[k][i]), direction);
        x = mpd_sub(x, mpd_mul(step.rate, velocity[k][i]));
      }
    store(velocity, step.velocity + first, left);
  }
  return true;
}

template <int BITS>
MPD_DEVICE bool apply(const MpdMessage& delta, MpdFound* found, long long bucket, const Weights& weights,
                      Elements& y) {
  Codes<BITS> moves;
  load<BITS>(moves, delta.codes, bucket);
  const float unit = delta.scales[bucket];
  const mpd_u32 check = mpd_check(sum_of_words<BITS>(moves, weights), unit, key_of(delta, bucket));
  const bool sound = mpd_finite(unit) && check == delta.checks[bucket];
  note<BITS>(found, bucket, sound, moves);
  if (sound) move<BITS>(y, unit, moves);
  return sound;
}

// Whether a bucket of a publication was decoded rightly.
MPD_DEVICE bool sound_of(const Rounded& rounded, float scale, mpd_u32 key, mpd_u32 check) {
  const mpd_u32 sum = warp_sum(rounded.sum), strays = warp_or(rounded.strays);
  return mpd_in_range(strays) && mpd_usable(scale) && mpd_check(sum, scale, key) == check;
}

template <int BITS>
MPD_DEVICE bool exchange(const MpdStep& step, long long bucket, const Weights& weights, Elements& y) {
  const MpdMessage &theirs = step.theirs, &reply = step.reply;
  Codes<BITS> moves;
  load<BITS>(moves, theirs.codes, bucket);
  const float scale = theirs.scales[bucket], inverse = mpd_inverse(scale);
  const mpd_u32 key = key_of(theirs, bucket);
  const auto nothing = [](int, int, mpd_u32) {};
  const Rounded rounded = theirs.nearest ? difference<BITS, false>(y, inverse, key, weights, moves, nothing)
                                         : difference<BITS, true>(y, inverse, key, weights, moves, nothing);
  const bool sound = sound_of(rounded, scale, key, theirs.checks[bucket]);
  note<BITS>(step.found, bucket, sound, moves);
  const float unit = sound ? mpd_mul(step.weight, scale) : 0.0f;
  if (sound)
    move<BITS>(y, unit, moves);
  else
    clear<BITS>(moves);
  if (reply.codes == nullptr) return sound;
  const float back = mpd_float(sound ? mpd_bits(unit) ^ 0x80000000u : 0);  // -unit
  store<BITS>(moves, reply.codes, bucket);
  const mpd_u32 check = mpd_check(sum_of_words<BITS>(moves, weights), back, key_of(reply, bucket));
  if (lane() == 0) {
    reply.scales[bucket] = back;
    reply.checks[bucket] = check;
  }
  return sound;
}

template <int BITS, bool SUBTRACT>
MPD_DEVICE bool merge(const MpdStep& step, long long bucket, const Weights& weights, Elements& y) {
  Codes<BITS> moves;
  load<BITS>(moves, step.theirs.codes, bucket);
  const float scale = step.theirs.scales[bucket];
  const mpd_u32 key = key_of(step.theirs, bucket);
  Elements averaged;
  const auto average = [&](int k, int i, mpd_u32 z) {
    float decoded = mpd_value(z);
    if (SUBTRACT) decoded = mpd_sub(decoded, dither(weights, k, i, key));
    averaged[k][i] = mpd_average(y[k][i], mpd_mul(scale, decoded), step.weight);
  };
  const Rounded rounded = difference<BITS, false>(y, mpd_inverse(scale), key, weights, moves, average);
  const bool sound = sound_of(rounded, scale, key, step.theirs.checks[bucket]);
  note<BITS>(step.found, bucket, sound, moves);
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[k][i] = sound ? averaged[k][i] : y[k][i];
  return sound;
}

template <int BITS>
MPD_DEVICE void publish(const MpdMessage& out, long long bucket, const Weights& weights, const Elements& x) {
  Codes<BITS> codes;
  const float scale = out.scales[bucket], inverse = mpd_inverse(scale);
  const mpd_u32 key = key_of(out, bucket);
  const Rounded rounded = out.nearest ? encode<BITS, false>(x, inverse, key, weights, codes)
                                      : encode<BITS, true>(x, inverse, key, weights, codes);
  const bool sound = mpd_in_range(warp_or(rounded.strays)) && mpd_usable(scale);
  const mpd_u32 sum = warp_sum(rounded.sum);
  if (!sound) clear<BITS>(codes);  // every reader must reject it
  store<BITS>(codes, out.codes, bucket);
  if (lane() == 0) out.checks[bucket] = sound ? mpd_check(sum, scale, key) : ~mpd_check(0, scale, key);
}

template <int BITS, int PARTS>
MPD_DEVICE void buckets(const MpdStep& step) {
  const Weights weights = weights_of_lane<BITS>();
  const mpd_u32 warps = blockDim.x / 32u;
  const long long stride = static_cast<long long>(gridDim.x) * warps;
  long long b = static_cast<long long>(blockIdx.x) * warps + threadIdx.x / 32u;
  for (; b * MPD_BUCKET < step.elements; b += stride) {
    const long long left = step.elements - b * MPD_BUCKET;
    float* x = step.x + b * MPD_BUCKET;
    bool moved = false;
    Elements y;
    load(y, x, left);
    if (PARTS & kSgd) moved |= sgd(step, b, left, y);
    if (PARTS & kApply) moved |= apply<BITS>(step.arrived[0], step.arrived_found[0], b, weights, y);
    if (PARTS & kAbsorb)
#pragma unroll 1
      for (int a = 0; a < step.arrivals; ++a)
        moved |= apply<BITS>(step.arrived[a], step.arrived_found[a], b, weights, y);
    if ((PARTS & kExchange) && step.theirs.codes != nullptr)
      moved |= exchange<BITS>(step, b, weights, y);
    if (PARTS & kMerge) {
      if (step.subtract && !step.theirs.nearest)
        moved |= merge<BITS, true>(step, b, weights, y);
      else
        moved |= merge<BITS, false>(step, b, weights, y);
    }
    if (moved) store(y, x, left);
    if ((PARTS & kPublish) && step.published.codes != nullptr)
      publish<BITS>(step.published, b, weights, y);
  }
}

// 256 threads, and 2 blocks on a multiprocessor: up to 128 registers a thread.
#define MPD_KERNEL(name, bits, parts)                                              \
  extern "C" __global__ void __launch_bounds__(256, 2)                             \
      mpd_##name##_##bits(const __grid_constant__ MpdStep step) {                  \
    buckets<bits, parts>(step);                                                    \
  }

// With MPD_BITS only those of that width: a program needs one, and each takes half a second to compile.
#ifdef MPD_BITS
#define MPD_KERNEL_OF(name, bits, parts) MPD_KERNEL(name, bits, parts)
#define MPD_KERNELS(name, parts) MPD_KERNEL_OF(name, MPD_BITS, parts)
#else
#define MPD_KERNELS(name, parts) \
  MPD_KERNEL(name, 4, parts)     \
  MPD_KERNEL(name, 8, parts)     \
  MPD_KERNEL(name, 16, parts)
#endif

MPD_KERNELS(encode, kPublish)
MPD_KERNELS(sgd_encode, kSgd | kPublish)
MPD_KERNELS(apply, kApply)
MPD_KERNELS(exchange, kExchange)
MPD_KERNELS(merge, kMerge)
MPD_KERNELS(merge_forward, kMerge | kPublish)
MPD_KERNELS(fused, kAbsorb | kExchange | kPublish)
