// The part of a bucket that one of a warp's 32 lanes holds in registers, and its loads and stores.
//
// Lane l has the elements j = 128 k + 4 l + i (k < 8, i < 4), so it accesses 16 bytes of a vector
// at a time. Its codes are the 32-bit words that hold the codes of these elements, as many words as
// a code has bits.
#ifndef MPD_CUDA_LANE_H
#define MPD_CUDA_LANE_H

#include "../lattice_math.h"

#define MPD_THREADS 256   // per block
#define MPD_MAX_DELTAS 4  // that one launch can absorb, or learn from

#define MPD_DEVICE static __device__ __forceinline__

typedef float Elements[8][4];
template <int BITS>
using Codes = mpd_u32[BITS];

MPD_DEVICE mpd_u32 lane() { return threadIdx.x & 31u; }

// Reductions over the lanes of the warp; every lane gets the result.
MPD_DEVICE mpd_u32 warp_sum(mpd_u32 a) { return __reduce_add_sync(0xffffffffu, a); }
MPD_DEVICE mpd_u32 warp_or(mpd_u32 a) { return __reduce_or_sync(0xffffffffu, a); }
MPD_DEVICE mpd_u32 warp_max(mpd_u32 a) { return __reduce_max_sync(0xffffffffu, a); }
MPD_DEVICE bool warp_all(bool a) { return __all_sync(0xffffffffu, a); }

// Exact. A cast would flush denormal numbers before (lattice_math.h).
MPD_DEVICE double widen(float a) {
#if defined(__CUDA_ARCH__)
  double b;
  asm("cvt.f64.f32 %0, %1;" : "=d"(b) : "f"(a));
  return b;
#else
  return a;
#endif
}

// In a fixed order; lane 0 gets the result.
MPD_DEVICE double warp_total(double a) {
#pragma unroll
  for (unsigned distance = 16; distance > 0; distance /= 2)
    a += __shfl_down_sync(0xffffffffu, a, distance);
  return a;
}

// The sum of every STEP-th of `count` STEP numbers that the warps of a launch have left; lane 0
// gets it. One warp does it: it keeps 16 loads on their way.
template <int STEP>
MPD_DEVICE double total_of(const double* from, int count) {
  double sum = 0.0;
#pragma unroll 16
  for (int i = static_cast<int>(lane()); i < count; i += 32) sum += from[i * STEP];
  return warp_total(sum);
}

MPD_DEVICE mpd_u32 larger(mpd_u32 a, mpd_u32 b) { return a > b ? a : b; }

// Factors of mpd_weight for the positions of this lane: low[i] for its elements, word[w % 4] for
// its words. Word w of the lane is word 32 w + l of the bucket, or, where words are read in pairs,
// 64 (w / 2) + 2 l + w % 2.
struct LaneWeights {
  mpd_u32 low[4], word[4];
};

template <int BITS>
MPD_DEVICE LaneWeights weights_of_lane() {
  LaneWeights weights;
#pragma unroll
  for (mpd_u32 i = 0; i < 4; ++i) {
    weights.low[i] = mpd_weight_low(lane() * 4 + i);
    weights.word[i] =
        mpd_weight_low(BITS == 16 ? i / 2 * 64 + lane() * 2 + i % 2 : i * 32 + lane());
  }
  return weights;
}

// 16 bytes at a time. By instruction, where the compiler does not always see that it can be so, as
// behind a branch to single elements.
MPD_DEVICE void load_quad(float (&y)[4], const float* from) {
#if defined(__CUDA_ARCH__)
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
#else
  const float4 quad = *reinterpret_cast<const float4*>(from);
  y[0] = quad.x, y[1] = quad.y, y[2] = quad.z, y[3] = quad.w;
#endif
}
MPD_DEVICE void store_quad(const float (&y)[4], float* to) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3])
               : "memory");
#else
  *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
#endif
}

// Loads the lane's part of the next 128 QUADS elements of a vector that has `left` more; zeros
// behind its end.
template <int QUADS>
MPD_DEVICE void load(float (&y)[QUADS][4], const float* from, long long left) {
  from += lane() * 4;
  if (left >= QUADS * 128) {
#pragma unroll
    for (int k = 0; k < QUADS; ++k) {
      const float4 quad = *reinterpret_cast<const float4*>(from + k * 128);
      y[k][0] = quad.x;
      y[k][1] = quad.y;
      y[k][2] = quad.z;
      y[k][3] = quad.w;
    }
    return;
  }
  const int end = static_cast<int>(left) - static_cast<int>(lane()) * 4;
#pragma unroll
  for (int k = 0; k < QUADS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[k][i] = k * 128 + i < end ? from[k * 128 + i] : 0.0f;
}

template <int QUADS>
MPD_DEVICE void store(const float (&y)[QUADS][4], float* to, long long left) {
  to += lane() * 4;
  if (left >= QUADS * 128) {
#pragma unroll
    for (int k = 0; k < QUADS; ++k) store_quad(y[k], to + k * 128);
    return;
  }
  const int end = static_cast<int>(left) - static_cast<int>(lane()) * 4;
#pragma unroll
  for (int k = 0; k < QUADS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (k * 128 + i < end) to[k * 128 + i] = y[k][i];
}

template <int BITS>
MPD_DEVICE void load(Codes<BITS>& codes, const void* message, long long bucket) {
  const mpd_u32* from = static_cast<const mpd_u32*>(message) + bucket * (BITS * 32);
  if constexpr (BITS == 16) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint2 pair = reinterpret_cast<const uint2*>(from)[k * 32 + lane()];
      codes[2 * k] = pair.x;
      codes[2 * k + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int w = 0; w < BITS; ++w) codes[w] = from[w * 32 + lane()];
  }
}

template <int BITS>
MPD_DEVICE void store(const Codes<BITS>& codes, void* message, long long bucket) {
  mpd_u32* to = static_cast<mpd_u32*>(message) + bucket * (BITS * 32);
  if constexpr (BITS == 16) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      reinterpret_cast<uint2*>(to)[k * 32 + lane()] = make_uint2(codes[2 * k], codes[2 * k + 1]);
  } else {
#pragma unroll
    for (int w = 0; w < BITS; ++w) to[w * 32 + lane()] = codes[w];
  }
}

template <int BITS>
MPD_DEVICE void clear(Codes<BITS>& codes) {
#pragma unroll
  for (int w = 0; w < BITS; ++w) codes[w] = 0;
}

// Returns the bits of an element's code; the bits above them are undefined. Of 4-bit codes the
// elements of an even k are in the low halves of the bytes, those of k + 1 in the high ones
// (layout.h).
template <int BITS>
MPD_DEVICE mpd_u32 get(const Codes<BITS>& codes, int k, int i) {
  if constexpr (BITS == 4) return codes[k / 2] >> (i * 8 + k % 2 * 4);
  if constexpr (BITS == 8) return codes[k] >> (i * 8);
  return codes[k * 2 % BITS + i / 2] >> (i % 2 * 16);
}

// Sets a code that was 0; upper bits of `value` are ignored.
template <int BITS>
MPD_DEVICE void put(Codes<BITS>& codes, int k, int i, mpd_u32 value) {
  value &= (1u << BITS) - 1u;
  if constexpr (BITS == 4) codes[k / 2] |= value << (i * 8 + k % 2 * 4);
  if constexpr (BITS == 8) codes[k] |= value << (i * 8);
  if constexpr (BITS == 16) codes[k * 2 + i / 2] |= value << (i % 2 * 16);
}

#endif
