// What one of a warp's 32 lanes holds of a bucket, in registers, and where that is in memory.
//
// Lane l has the elements j = 128 k + 4 l + i (k < 8, i < 4), and so 16 bytes of a vector at a time. Its codes
// are the 32-bit words that hold these elements' codes, as many words as a code has bits.
#ifndef MPD_CUDA_LANE_H
#define MPD_CUDA_LANE_H

#include "../lattice_math.h"

#define MPD_DEVICE static __device__ __forceinline__

typedef float Elements[8][4];
template <int BITS>
using Codes = mpd_u32[BITS];

MPD_DEVICE mpd_u32 lane() { return threadIdx.x & 31u; }

// Sums and unions over the warp's lanes; every lane gets them.
MPD_DEVICE mpd_u32 warp_sum(mpd_u32 a) { return __reduce_add_sync(0xffffffffu, a); }
MPD_DEVICE mpd_u32 warp_or(mpd_u32 a) { return __reduce_or_sync(0xffffffffu, a); }
MPD_DEVICE mpd_u32 warp_max(mpd_u32 a) { return __reduce_max_sync(0xffffffffu, a); }

// The lane's factors of mpd_weight: low[i] for its elements; word[w % 4] for its words, of which word w is
// word 32 w + l of the bucket, or, where they are read in pairs, 64 (w / 2) + 2 l + w % 2.
struct Weights {
  mpd_u32 low[4], word[4];
};

template <int BITS>
MPD_DEVICE Weights weights_of_lane() {
  Weights weights;
#pragma unroll
  for (mpd_u32 i = 0; i < 4; ++i) {
    weights.low[i] = mpd_weight_low(lane() * 4 + i);
    weights.word[i] = mpd_weight_low(BITS == 16 ? i / 2 * 64 + lane() * 2 + i % 2 : i * 32 + lane());
  }
  return weights;
}

// The lane's part of the next 128 QUADS elements of a vector that has `left` more; zeros behind its end.
template <int QUADS>
MPD_DEVICE void load(float (&y)[QUADS][4], const float* from, long long left) {
  from += lane() * 4;
  if (left >= QUADS * 128) {
#pragma unroll
    for (int k = 0; k < QUADS; ++k) {
      const float4 four = *reinterpret_cast<const float4*>(from + k * 128);
      y[k][0] = four.x;
      y[k][1] = four.y;
      y[k][2] = four.z;
      y[k][3] = four.w;
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
    for (int k = 0; k < QUADS; ++k)
      *reinterpret_cast<float4*>(to + k * 128) = make_float4(y[k][0], y[k][1], y[k][2], y[k][3]);
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
      const uint2 two = reinterpret_cast<const uint2*>(from)[k * 32 + lane()];
      codes[2 * k] = two.x;
      codes[2 * k + 1] = two.y;
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

// The bits of an element's code and whatever is above them. Two codes of 4 bits share a byte: the elements of
// an even k are in the low halves, those of k + 1 in the high ones.
template <int BITS>
MPD_DEVICE mpd_u32 get(const Codes<BITS>& codes, int k, int i) {
  if constexpr (BITS == 4) return codes[k / 2] >> (i * 8 + k % 2 * 4);
  if constexpr (BITS == 8) return codes[k] >> (i * 8);
  return codes[k * 2 % BITS + i / 2] >> (i % 2 * 16);
}

// Sets a code that was clear; upper bits of `value` are left out.
template <int BITS>
MPD_DEVICE void put(Codes<BITS>& codes, int k, int i, mpd_u32 value) {
  value &= (1u << BITS) - 1u;
  if constexpr (BITS == 4) codes[k / 2] |= value << (i * 8 + k % 2 * 4);
  if constexpr (BITS == 8) codes[k] |= value << (i * 8);
  if constexpr (BITS == 16) codes[k * 2 + i / 2] |= value << (i % 2 * 16);
}

#endif
