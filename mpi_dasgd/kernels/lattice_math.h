// Lattice code of one element, shared by the CPU library and the CUDA kernels. No system header:
// NVRTC has none.
//
// Only integer operations and IEEE-754 binary32 operations that are rounded once, in a fixed order:
// contraction must be off in every compiler (-ffp-contract=off, --fmad=false). Then all backends,
// kernels/reference.py included, give the same bits.
//
//     encode      z = round(x (1/s) + u);  code = z mod 2^b
//     difference  m = round(y (1/s) + u);  d = signed(code - m);  z = m + d
//     move        y + unit d
//     merge       m = round(y (1/s));  d = signed(code - m);  y + w (s (m + d [- u]) - y)
//
// u is the dither, 0 for rounding to the nearest. With the SAME u on both sides, d rounds (x -
// y)/s. The unit is w s, and -w s in the delta for the partner.
//
// Rounding adds 1.5 * 2^23, which leaves the integer in the low bits of the sum. It stays there, as
// an unsigned "point" z + 0x4b400000: the constant is a multiple of 2^16, so it does not affect the
// codes.
//
// Davies, Gurunathan, Moshrefi, Ashkboos, Alistarh (ICLR 2021, arXiv 2002.09268): the cubic
// lattice. The bucket, the checksum and the shared dither are ours.
#ifndef MPD_LATTICE_MATH_H
#define MPD_LATTICE_MATH_H

#include "exact_math.h"

#define MPD_MAGIC 12582912.0f  // 1.5 * 2^23, whose bits are 0x4b400000

// The nearest lattice point, ties to even, for -2^22 <= a < 2^22.
MPD_HD mpd_u32 mpd_round(float a) { return mpd_bits(mpd_add(a, MPD_MAGIC)); }

// The bits that tell whether a rounding was out of range or of NaN: a bucket is rejected if the
// union of its points' range bits has one of the upper nine bits set.
MPD_HD mpd_u32 mpd_range_bits(mpd_u32 point) { return point ^ 0x4b000000u; }
MPD_HD bool mpd_in_range(mpd_u32 range_bits) { return range_bits < 0x00800000u; }

// The integer of a point, as a number.
MPD_HD float mpd_value(mpd_u32 point) { return mpd_sub(mpd_float(point), MPD_MAGIC); }

// 32-bit hash with full avalanche ("lowbias32", C. Wellons).
MPD_HD constexpr mpd_u32 mpd_mix(mpd_u32 x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Key of a bucket of the message made with `seed`: the bucket's dither and checksum depend on it.
MPD_HD mpd_u32 mpd_key(mpd_u64 seed, mpd_u64 bucket) {
  mpd_u32 k = mpd_mix(static_cast<mpd_u32>(seed) ^ 0x9e3779b9u);
  k = mpd_mix(k + static_cast<mpd_u32>(seed >> 32));
  k = mpd_mix(k + static_cast<mpd_u32>(bucket));
  return mpd_mix(k + static_cast<mpd_u32>(bucket >> 32));
}

// Checksum weight of position j: a product of two hashes, forced odd so that a single wrong term
// always changes the sum modulo 2^32. The factors are those of j mod 128 and of j / 128.
MPD_HD constexpr mpd_u32 mpd_weight_low(mpd_u32 i) { return mpd_mix(i + 1u) | 1u; }
MPD_HD constexpr mpd_u32 mpd_weight_high(mpd_u32 row) { return mpd_mix(row + 1001u) | 1u; }
MPD_HD constexpr mpd_u32 mpd_weight(mpd_u32 j) {
  return mpd_weight_low(j & 127u) * mpd_weight_high(j >> 7);
}

// Dither in [-1/2, 1/2), uniform over keys: the weights of the positions, all rotated by the key (a
// Cranley-Patterson rotation), which costs no multiplication.
MPD_HD float mpd_dither(mpd_u32 weight, mpd_u32 key) {
  return mpd_sub(mpd_float(((weight + key) >> 9) | 0x3f800000u), 1.5f);
}

// Term of a point in the checksum of a publication, before its weight. A point that is wrong by a
// multiple of 2^BITS, as after a failed decoding, gives a term that is wrong by an odd multiple of
// a smaller power of two.
template <int BITS>
MPD_HD mpd_u32 mpd_fold(mpd_u32 point) {
  return point + (point >> BITS);
}

// Checksum of a bucket from its weighted sum, its scale and its key. The sum is over weight * fold
// of the points (publication) or over weight[k] * 32-bit word k of the codes (delta). It does not
// depend on the order of summation.
MPD_HD mpd_u32 mpd_checksum(mpd_u32 sum, float scale, mpd_u32 key) {
  return (sum + mpd_mix(mpd_bits(scale) + 0x632be59bu)) ^ key;
}

// The signed number of BITS bits that is congruent to `a`.
template <int BITS>
MPD_HD int mpd_signed(mpd_u32 a) {
  return static_cast<int>(a << (32 - BITS)) >> (32 - BITS);
}

// Whether a scale can be divided by and multiplied with: positive, normal, not huge.
MPD_HD bool mpd_scale_ok(float scale) {
  return mpd_bits(scale) - 0x00800000u <= 0x7e000000u - 0x00800000u;
}

MPD_HD float mpd_average(float y, float other, float weight) {
  return mpd_add(y, mpd_mul(weight, mpd_sub(other, y)));
}

#endif
