// The lattice code of one element, shared by the CPU library and the CUDA kernels. No include: NVRTC has none.
//
// Only integer operations and IEEE-754 binary32 operations that are rounded once, in a fixed order: contraction
// must be off in every compiler (-ffp-contract=off, --fmad=false). Then all paths, and kernels/reference.py,
// give the same bits.
//
//     encode      z = round(x (1/s) + u);  code = z mod 2^b                    u: dither, or left out for nearest
//     difference  m = round(y (1/s) + u);  d = signed(code - m);  z = m + d    the SAME u: d rounds (x - y)/s
//     move        y + unit d                                                   unit = w s, its partner's -w s
//     merge       m = round(y (1/s));  d = signed(code - m);  y + w (s (m + d [- u]) - y)
//
// Rounding adds 1.5 * 2^23, which leaves the integer in the low bits of the sum. It stays there, z + 0x4b400000,
// as an unsigned "point": the constant is a multiple of 2^16, so that it does not show in the codes.
//
// Davies, Gurunathan, Moshrefi, Ashkboos, Alistarh (ICLR 2021, arXiv 2002.09268): the cubic lattice. The bucket,
// the check and the shared dither are ours.
#ifndef MPD_LATTICE_H
#define MPD_LATTICE_H

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MPD_HD __host__ __device__ __forceinline__
#else
#define MPD_HD static inline __attribute__((always_inline))
#endif

typedef unsigned int mpd_u32;
typedef unsigned long long mpd_u64;

#define MPD_BUCKET 1024  // elements that share a scale and a check
#define MPD_MAGIC 12582912.0f  // 1.5 * 2^23, whose bits are 0x4b400000

#if defined(__CUDA_ARCH__)
// By instruction: CuPy compiles with -ftz=true whatever it is asked for, and then __fmul_rn and its like flush
// denormal numbers to zero. (The reciprocal of a usable scale is not denormal.)
#define MPD_EXACT(name, instruction)                                           \
  MPD_HD float name(float a, float b) {                                        \
    float c;                                                                   \
    asm(instruction ".rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));         \
    return c;                                                                  \
  }
MPD_EXACT(mpd_mul, "mul")
MPD_EXACT(mpd_add, "add")
MPD_EXACT(mpd_sub, "sub")
#undef MPD_EXACT
MPD_HD float mpd_inverse(float a) { return __frcp_rn(a); }
MPD_HD mpd_u32 mpd_bits(float a) { return __float_as_uint(a); }
MPD_HD float mpd_float(mpd_u32 a) { return __uint_as_float(a); }
#else
MPD_HD float mpd_mul(float a, float b) { return a * b; }
MPD_HD float mpd_add(float a, float b) { return a + b; }
MPD_HD float mpd_sub(float a, float b) { return a - b; }
MPD_HD float mpd_inverse(float a) { return 1.0f / a; }
MPD_HD mpd_u32 mpd_bits(float a) {
  mpd_u32 bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
MPD_HD float mpd_float(mpd_u32 bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}
#endif

// To the nearest lattice point, ties to even, for -2^22 <= a < 2^22.
MPD_HD mpd_u32 mpd_round(float a) { return mpd_bits(mpd_add(a, MPD_MAGIC)); }

// The bits that tell whether a rounding was out of range or of NaN: a bucket is refused if the `or` of its
// points' strays has one of the upper nine bits set.
MPD_HD mpd_u32 mpd_stray(mpd_u32 point) { return point ^ 0x4b000000u; }
MPD_HD bool mpd_in_range(mpd_u32 strays) { return strays < 0x00800000u; }

// The integer of a point, as a number.
MPD_HD float mpd_value(mpd_u32 point) { return mpd_sub(mpd_float(point), MPD_MAGIC); }

// A 32-bit mixer of full avalanche ("lowbias32", C. Wellons).
MPD_HD mpd_u32 mpd_mix(mpd_u32 x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Key of a bucket of the message made with `seed`: what is random or checked in it depends on this.
MPD_HD mpd_u32 mpd_key(mpd_u64 seed, mpd_u64 bucket) {
  mpd_u32 k = mpd_mix((mpd_u32)seed ^ 0x9e3779b9u);
  k = mpd_mix(k + (mpd_u32)(seed >> 32));
  k = mpd_mix(k + (mpd_u32)bucket);
  return mpd_mix(k + (mpd_u32)(bucket >> 32));
}

// The random number of position j of a bucket, the product of two: odd, so that as a multiplier it lets no
// single error of a sum go unseen.
MPD_HD mpd_u32 mpd_weight_low(mpd_u32 i) { return mpd_mix(i + 1u) | 1u; }              // i = j mod 128
MPD_HD mpd_u32 mpd_weight_high(mpd_u32 group) { return mpd_mix(group + 1001u) | 1u; }  // group = j / 128
MPD_HD mpd_u32 mpd_weight(mpd_u32 j) { return mpd_weight_low(j & 127u) * mpd_weight_high(j >> 7); }

// Dither in [-1/2, 1/2), uniform over keys: the positions' random numbers, all turned by the key (a Cranley-
// Patterson rotation), which costs no multiplication.
MPD_HD float mpd_dither(mpd_u32 weight, mpd_u32 key) {
  return mpd_sub(mpd_float(((weight + key) >> 9) | 0x3f800000u), 1.5f);
}

// What a point adds to the check of a publication, before its weight. A point that is wrong by a multiple
// of 2^BITS, as by a failed decoding, is wrong by an odd multiple of a smaller power here.
template <int BITS>
MPD_HD mpd_u32 mpd_fold(mpd_u32 point) {
  return point + (point >> BITS);
}

// The check of a bucket: sum of weight * fold (publication) or weight[k] * 32-bit word k of the codes (delta),
// its scale, and its key. Independent of the order of summation.
MPD_HD mpd_u32 mpd_check(mpd_u32 sum, float scale, mpd_u32 key) {
  return (sum + mpd_mix(mpd_bits(scale) + 0x632be59bu)) ^ key;
}

// The signed number of BITS bits that is congruent to `a`.
template <int BITS>
MPD_HD int mpd_signed(mpd_u32 a) {
  return (int)(a << (32 - BITS)) >> (32 - BITS);
}

// Whether a scale can be divided by and multiplied with: positive, normal, not huge.
MPD_HD bool mpd_usable(float scale) {
  return mpd_bits(scale) - 0x00800000u <= 0x7e000000u - 0x00800000u;
}
MPD_HD bool mpd_finite(float a) { return (mpd_bits(a) & 0x7fffffffu) < 0x7f800000u; }

MPD_HD float mpd_average(float y, float other, float weight) {
  return mpd_add(y, mpd_mul(weight, mpd_sub(other, y)));
}

#endif
