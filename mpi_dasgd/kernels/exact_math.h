// Operations on float32 that are rounded once, shared by the CPU library and the CUDA kernels. No
// system header: NVRTC has none.
//
// Contraction must be off in every compiler (-ffp-contract=off, --fmad=false): then all backends
// give the same bits, those of NumPy. A fused multiply-add is one only where it is written.
#ifndef MPD_EXACT_MATH_H
#define MPD_EXACT_MATH_H

#include "layout.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define MPD_HD __host__ __device__ __forceinline__
#else
#define MPD_HD static inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
// By instruction: CuPy always compiles with -ftz=true, and then __fmul_rn and its like flush
// denormal numbers to zero. (The reciprocal of a scale that is ok is not denormal.)
#define MPD_EXACT(name, instruction)                            \
  MPD_HD float name(float a, float b) {                         \
    float c;                                                    \
    asm(instruction " %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b)); \
    return c;                                                   \
  }
MPD_EXACT(mpd_mul, "mul.rn.f32")
MPD_EXACT(mpd_add, "add.rn.f32")
MPD_EXACT(mpd_sub, "sub.rn.f32")
MPD_EXACT(mpd_divide, "div.rn.f32")
// Of a number and NaN both give the number.
MPD_EXACT(mpd_larger, "max.f32")
MPD_EXACT(mpd_smaller, "min.f32")
#undef MPD_EXACT
MPD_HD float mpd_fma(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}
MPD_HD float mpd_sqrt(float a) {
  float b;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(b) : "f"(a));
  return b;
}
// Also of the bits the compiler makes a minus, which flushes.
MPD_HD float mpd_negative(float a) {
  float b;
  asm("neg.f32 %0, %1;" : "=f"(b) : "f"(a));
  return b;
}
MPD_HD bool mpd_greater(float a, float b) {
  mpd_u32 c;
  asm("set.gt.u32.f32 %0, %1, %2;" : "=r"(c) : "f"(a), "f"(b));
  return c != 0;
}
MPD_HD float mpd_inverse(float a) { return __frcp_rn(a); }
MPD_HD float mpd_from_integer(mpd_u32 a) { return __uint2float_rn(a); }
MPD_HD mpd_u32 mpd_bits(float a) { return __float_as_uint(a); }
MPD_HD float mpd_float(mpd_u32 a) { return __uint_as_float(a); }
#else
MPD_HD float mpd_mul(float a, float b) { return a * b; }
MPD_HD float mpd_add(float a, float b) { return a + b; }
MPD_HD float mpd_sub(float a, float b) { return a - b; }
MPD_HD float mpd_divide(float a, float b) { return a / b; }
MPD_HD float mpd_larger(float a, float b) { return __builtin_fmaxf(a, b); }
MPD_HD float mpd_smaller(float a, float b) { return __builtin_fminf(a, b); }
MPD_HD float mpd_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MPD_HD float mpd_sqrt(float a) { return __builtin_sqrtf(a); }
MPD_HD float mpd_negative(float a) { return -a; }
MPD_HD bool mpd_greater(float a, float b) { return a > b; }
MPD_HD float mpd_inverse(float a) { return 1.0f / a; }
MPD_HD float mpd_from_integer(mpd_u32 a) { return static_cast<float>(a); }
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

MPD_HD bool mpd_finite(float a) { return (mpd_bits(a) & 0x7fffffffu) < 0x7f800000u; }

#endif
