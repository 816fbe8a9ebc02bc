// The lattice codec on a GPU. A warp owns a bucket, whose elements are in its lanes' registers from
// the load to the store: all stages together pass once over memory, and a checksum is verified
// before anything is written. No shared memory, no barriers, no atomics; the results do not depend
// on the size of the grid.
#include "optimizer.h"

// Argument of one launch, passed by value; mirrored in kernels/cuda/__init__.py. A fused step takes
// one launch or several. Vectors without codes, and pointers that are null, leave their part of the
// work out.
struct MpdKernelArguments {
  float* x;
  long long elements;
  MpdEncodedVector partner_model, reply_delta, publication;
  MpdEncodedVector deltas[MPD_MAX_DELTAS];
  MpdBucketStats* delta_stats[MPD_MAX_DELTAS];
  MpdBucketStats* stats;
  float weight;
  int delta_count, subtract_dither;
  MpdOptimizer optimizer;
};

// Parts of a kernel; the others are not compiled into it. kApply is one delta, kAbsorb any number
// of them.
enum Parts { kApply = 1, kAbsorb = 2, kExchange = 4, kMerge = 8, kPublish = 16 };

MPD_DEVICE mpd_u32 key_of(const MpdEncodedVector& vector, long long bucket) {
  return mpd_key(vector.seed, static_cast<mpd_u64>(bucket));
}

// The lattice of a bucket: its scale, and the key of its dither. The checksum is loaded only when
// it is compared: it would occupy a register from here on.
struct BucketLattice {
  float scale, inverse;
  mpd_u32 key;
};

MPD_DEVICE BucketLattice lattice_of(const MpdEncodedVector& vector, long long bucket) {
  const float scale = vector.scales[bucket];
  return {scale, mpd_inverse(scale), key_of(vector, bucket)};
}

// What the validity of a rounded bucket depends on: the sum for its checksum, and its range bits.
struct Rounded {
  mpd_u32 sum = 0, range_bits = 0;
};

MPD_DEVICE float dither(const LaneWeights& weights, int k, int i, mpd_u32 key) {
  return mpd_dither(weights.low[i] * mpd_weight_high(k), key);
}

template <bool DITHER>
MPD_DEVICE mpd_u32 point_of(float y, const BucketLattice& lattice, const LaneWeights& weights,
                            int k, int i, Rounded& rounded) {
  float t = mpd_mul(y, lattice.inverse);
  if (DITHER) t = mpd_add(t, dither(weights, k, i, lattice.key));
  const mpd_u32 point = mpd_round(t);
  rounded.range_bits |= mpd_range_bits(point);
  return point;
}

template <int BITS, bool DITHER>
MPD_DEVICE Rounded encode(const Elements& x, const BucketLattice& lattice,
                          const LaneWeights& weights, Codes<BITS>& codes) {
  Rounded rounded;
  clear<BITS>(codes);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mpd_u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const mpd_u32 z = point_of<DITHER>(x[k][i], lattice, weights, k, i, rounded);
      sum += mpd_fold<BITS>(z) * weights.low[i];
      put<BITS>(codes, k, i, z);
    }
    rounded.sum += sum * mpd_weight_high(k);
  }
  return rounded;
}

// Codes of a publication against y -> their differences on the lattice, in the same place. Calls
// visit(k, i, z).
template <int BITS, bool DITHER, class Visit>
MPD_DEVICE Rounded difference(const Elements& y, const BucketLattice& lattice,
                              const LaneWeights& weights, Codes<BITS>& codes, Visit visit) {
  Rounded rounded;
  Codes<BITS> delta_codes;
  clear<BITS>(delta_codes);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    mpd_u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const mpd_u32 m = point_of<DITHER>(y[k][i], lattice, weights, k, i, rounded);
      const mpd_u32 d = static_cast<mpd_u32>(mpd_signed<BITS>(get<BITS>(codes, k, i) - m));
      sum += mpd_fold<BITS>(m + d) * weights.low[i];
      put<BITS>(delta_codes, k, i, d);
      visit(k, i, m + d);
    }
    rounded.sum += sum * mpd_weight_high(k);
  }
#pragma unroll
  for (int w = 0; w < BITS; ++w) codes[w] = delta_codes[w];
  return rounded;
}

// Weighted sum of the 32-bit words of a bucket of a delta, for its checksum.
template <int BITS>
MPD_DEVICE mpd_u32 sum_of_words(const Codes<BITS>& delta_codes, const LaneWeights& weights) {
  mpd_u32 sum = 0;
#pragma unroll
  for (int w = 0; w < BITS; ++w)
    sum += delta_codes[w] * weights.word[w % 4] * mpd_weight_high(w / 4);
  return warp_sum(sum);
}

template <int BITS>
MPD_DEVICE void move(Elements& y, float unit, const Codes<BITS>& delta_codes) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = mpd_signed<BITS>(get<BITS>(delta_codes, k, i));
      y[k][i] = mpd_add(y[k][i], mpd_mul(unit, static_cast<float>(d)));
    }
}

// Writes the statistics of the differences on the lattice, if there is a place for them.
template <int BITS>
MPD_DEVICE void write_stats(MpdBucketStats* stats, long long bucket, bool valid,
                            const Codes<BITS>& delta_codes) {
  if (stats == nullptr) return;
  mpd_u32 largest = 0, low = 0;
  mpd_u64 sum = 0;
  if (valid) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = mpd_signed<BITS>(get<BITS>(delta_codes, k, i));
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
  if (lane() == 0) stats[bucket] = {!valid, largest, sum};
}

// --- stages of a step, on one bucket; those that change y return whether they did ---

template <int BITS>
MPD_DEVICE bool apply(const MpdEncodedVector& delta, MpdBucketStats* stats, long long bucket,
                      const LaneWeights& weights, Elements& y) {
  Codes<BITS> delta_codes;
  load<BITS>(delta_codes, delta.codes, bucket);
  const float unit = delta.scales[bucket];
  const mpd_u32 checksum =
      mpd_checksum(sum_of_words<BITS>(delta_codes, weights), unit, key_of(delta, bucket));
  const bool valid = warp_all(mpd_finite(unit) && checksum == delta.checksums[bucket]);
  write_stats<BITS>(stats, bucket, valid, delta_codes);
  if (valid) move<BITS>(y, unit, delta_codes);
  return valid;
}

// Whether the points that were decoded from a bucket are those that were published. The lanes vote,
// as in apply: each has loaded scale and checksum itself, and if another process wrote there at that
// moment, some of them would enter the reductions of write_stats and wait for the others for ever.
MPD_DEVICE bool is_valid(const Rounded& rounded, const BucketLattice& lattice, mpd_u32 checksum) {
  const mpd_u32 sum = warp_sum(rounded.sum), range_bits = warp_or(rounded.range_bits);
  return warp_all(mpd_in_range(range_bits) && mpd_scale_ok(lattice.scale) &&
                  mpd_checksum(sum, lattice.scale, lattice.key) == checksum);
}

template <int BITS>
MPD_DEVICE bool exchange(const MpdKernelArguments& args, long long bucket,
                         const LaneWeights& weights, Elements& y) {
  const MpdEncodedVector &partner_model = args.partner_model, &reply = args.reply_delta;
  Codes<BITS> delta_codes;
  load<BITS>(delta_codes, partner_model.codes, bucket);
  const BucketLattice lattice = lattice_of(partner_model, bucket);
  const auto ignore = [](int, int, mpd_u32) {};
  const Rounded rounded = partner_model.nearest
                              ? difference<BITS, false>(y, lattice, weights, delta_codes, ignore)
                              : difference<BITS, true>(y, lattice, weights, delta_codes, ignore);
  const bool valid = is_valid(rounded, lattice, partner_model.checksums[bucket]);
  write_stats<BITS>(args.stats, bucket, valid, delta_codes);
  const float unit = valid ? mpd_mul(args.weight, lattice.scale) : 0.0f;
  if (valid)
    move<BITS>(y, unit, delta_codes);
  else
    clear<BITS>(delta_codes);
  if (reply.codes == nullptr) return valid;
  const float back = valid ? mpd_negative(unit) : 0.0f;
  store<BITS>(delta_codes, reply.codes, bucket);
  const mpd_u32 checksum =
      mpd_checksum(sum_of_words<BITS>(delta_codes, weights), back, key_of(reply, bucket));
  if (lane() == 0) {
    reply.scales[bucket] = back;
    reply.checksums[bucket] = checksum;
  }
  return valid;
}

template <int BITS, bool SUBTRACT>
MPD_DEVICE bool merge(const MpdKernelArguments& args, long long bucket, const LaneWeights& weights,
                      Elements& y) {
  Codes<BITS> delta_codes;
  load<BITS>(delta_codes, args.partner_model.codes, bucket);
  const BucketLattice lattice = lattice_of(args.partner_model, bucket);
  Elements averaged;
  const auto average = [&](int k, int i, mpd_u32 z) {
    float decoded = mpd_value(z);
    if (SUBTRACT) decoded = mpd_sub(decoded, dither(weights, k, i, lattice.key));
    averaged[k][i] = mpd_average(y[k][i], mpd_mul(lattice.scale, decoded), args.weight);
  };
  const Rounded rounded = difference<BITS, false>(y, lattice, weights, delta_codes, average);
  const bool valid = is_valid(rounded, lattice, args.partner_model.checksums[bucket]);
  write_stats<BITS>(args.stats, bucket, valid, delta_codes);
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[k][i] = valid ? averaged[k][i] : y[k][i];
  return valid;
}

template <int BITS>
MPD_DEVICE void publish(const MpdEncodedVector& out, long long bucket, const LaneWeights& weights,
                        const Elements& x) {
  Codes<BITS> codes;
  const BucketLattice lattice = lattice_of(out, bucket);
  const Rounded rounded = out.nearest ? encode<BITS, false>(x, lattice, weights, codes)
                                      : encode<BITS, true>(x, lattice, weights, codes);
  const bool valid = mpd_in_range(warp_or(rounded.range_bits)) && mpd_scale_ok(lattice.scale);
  const mpd_u32 sum = warp_sum(rounded.sum);
  if (!valid) clear<BITS>(codes);  // every reader must reject it
  store<BITS>(codes, out.codes, bucket);
  if (lane() == 0)
    out.checksums[bucket] = valid ? mpd_checksum(sum, lattice.scale, lattice.key)
                                  : ~mpd_checksum(0, lattice.scale, lattice.key);
}

// OPTIMIZER is the kind of the optimizer whose step comes first; 0: there is none.
template <int BITS, int PARTS, int OPTIMIZER = 0>
MPD_DEVICE void buckets(const MpdKernelArguments& args) {
  const LaneWeights weights = weights_of_lane<BITS>();
  const mpd_u32 warps = blockDim.x / 32u;
  const long long stride = static_cast<long long>(gridDim.x) * warps;
  long long b = static_cast<long long>(blockIdx.x) * warps + threadIdx.x / 32u;
  for (; b * MPD_BUCKET < args.elements; b += stride) {
    const long long left = args.elements - b * MPD_BUCKET;
    float* x = args.x + b * MPD_BUCKET;
    bool changed = false;
    Elements y;
    load(y, x, left);
    if constexpr (OPTIMIZER != 0)
      changed |= optimize<OPTIMIZER>(args.optimizer, b * MPD_BUCKET, left, y);
    if (PARTS & kApply) changed |= apply<BITS>(args.deltas[0], args.delta_stats[0], b, weights, y);
    if (PARTS & kAbsorb)
#pragma unroll 1
      for (int a = 0; a < args.delta_count; ++a)
        changed |= apply<BITS>(args.deltas[a], args.delta_stats[a], b, weights, y);
    if ((PARTS & kExchange) && args.partner_model.codes != nullptr)
      changed |= exchange<BITS>(args, b, weights, y);
    if (PARTS & kMerge) {
      if (args.subtract_dither && !args.partner_model.nearest)
        changed |= merge<BITS, true>(args, b, weights, y);
      else
        changed |= merge<BITS, false>(args, b, weights, y);
    }
    if (changed) store(y, x, left);
    if ((PARTS & kPublish) && args.publication.codes != nullptr)
      publish<BITS>(args.publication, b, weights, y);
  }
}

// 2 blocks of 256 threads per multiprocessor: up to 128 registers per thread.
#define MPD_KERNEL(name, bits, ...)                                          \
  extern "C" __global__ void __launch_bounds__(MPD_THREADS, 2)               \
      mpd_##name##_##bits(const __grid_constant__ MpdKernelArguments args) { \
    buckets<bits, __VA_ARGS__>(args);                                        \
  }

// With MPD_BITS only the kernels of that width, and with MPD_OPTIMIZER only those with a step of an
// optimizer, or only those without: a program needs few, and each takes half a second to compile.
#ifdef MPD_BITS
#define MPD_KERNEL_OF(name, bits, ...) MPD_KERNEL(name, bits, __VA_ARGS__)
#define MPD_KERNELS(name, ...) MPD_KERNEL_OF(name, MPD_BITS, __VA_ARGS__)
#else
#define MPD_KERNELS(name, ...)     \
  MPD_KERNEL(name, 4, __VA_ARGS__) \
  MPD_KERNEL(name, 8, __VA_ARGS__) \
  MPD_KERNEL(name, 16, __VA_ARGS__)
#endif

#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 0
MPD_KERNELS(encode, kPublish)
MPD_KERNELS(apply, kApply)
MPD_KERNELS(exchange, kExchange)
MPD_KERNELS(merge, kMerge)
MPD_KERNELS(merge_forward, kMerge | kPublish)
MPD_KERNELS(fused, kAbsorb | kExchange | kPublish)
#endif
#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 1
MPD_KERNELS(fused_sgd, kAbsorb | kExchange | kPublish, kSgd)
#endif
#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 2
MPD_KERNELS(fused_adam, kAbsorb | kExchange | kPublish, kAdam)
#endif
