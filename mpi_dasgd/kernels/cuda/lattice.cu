// The lattice codec on a GPU. A warp owns a bucket, whose elements are in its lanes' registers from
// the load to the store: all stages together pass once over memory, and a checksum is verified
// before anything is written. No shared memory, no barriers, no atomics; the results do not depend
// on the size of the grid.
#include "lane.h"

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
  float* velocity;
  const float* gradient;
  float weight, lr, momentum, weight_decay;
  int delta_count, subtract_dither;
};

// Parts of a kernel; the others are not compiled into it. kApply is one delta, kAbsorb any number
// of them.
enum Part { kSgd = 1, kApply = 2, kAbsorb = 4, kExchange = 8, kMerge = 16, kPublish = 32 };

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

// In two halves: a whole bucket of three vectors does not fit into the registers.
MPD_DEVICE bool sgd(const MpdKernelArguments& args, long long bucket, long long left, Elements& y) {
#pragma unroll
  for (int half = 0; half < 2; ++half, left -= MPD_BUCKET / 2) {
    const long long first = bucket * MPD_BUCKET + half * (MPD_BUCKET / 2);
    float velocity[4][4], gradient[4][4];
    load(velocity, args.velocity + first, left);
    load(gradient, args.gradient + first, left);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = y[half * 4 + k][i];
        const float direction = mpd_add(gradient[k][i], mpd_mul(args.weight_decay, x));
        velocity[k][i] = mpd_add(mpd_mul(args.momentum, velocity[k][i]), direction);
        x = mpd_sub(x, mpd_mul(args.lr, velocity[k][i]));
      }
    store(velocity, args.velocity + first, left);
  }
  return true;
}

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
  const float back = mpd_float(valid ? mpd_bits(unit) ^ 0x80000000u : 0);  // -unit
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

template <int BITS, int PARTS>
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
    if (PARTS & kSgd) changed |= sgd(args, b, left, y);
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
#define MPD_KERNEL(name, bits, parts)                                        \
  extern "C" __global__ void __launch_bounds__(MPD_THREADS, 2)               \
      mpd_##name##_##bits(const __grid_constant__ MpdKernelArguments args) { \
    buckets<bits, parts>(args);                                              \
  }

// With MPD_BITS only the kernels of that width: a program needs one, and each takes half a second
// to compile.
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
