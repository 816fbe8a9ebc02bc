// Runs unmodified .cu files on the CPU, as far as ours need it. The 32 lanes of a warp are
// fibers that take turns: each runs up to the next collective or to its end. It aborts if lanes
// wait at different collectives, or some have ended while others wait. Warps and blocks run one
// after the other.
//
// Not to be seen here: races between lanes (the order of turns alternates, that is all), the
// device's memory model, and the compiler's instructions. __CUDA_ARCH__ stays undefined: this is
// host code.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

struct ShimIndex {
  unsigned x = 1, y = 1, z = 1;
};
static ShimIndex threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int kLanes = 32;
constexpr size_t kStack = 1 << 16;

using Combine = unsigned (*)(unsigned, unsigned);

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool ended = false;
  unsigned value = 0;           // what it brings to a reduction,
  double number = 0.0;          // or to a shuffle
  double found = 0.0;           // what the shuffle gives it
  unsigned distance = 0;        // to the lane that gives it
  const void* place = nullptr;  // where the collective is in the program
};

static Lane lanes[kLanes];
static ucontext_t scheduler;
static int current;
static Combine combine;
static unsigned result;
static std::function<void()> kernel;
static unsigned* torn;  // a word that another process writes meanwhile: odd lanes see it changed

inline unsigned sum(unsigned a, unsigned b) { return a + b; }
inline unsigned any(unsigned a, unsigned b) { return a | b; }
inline unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned both(unsigned a, unsigned b) { return a & b; }

inline void die(const char* reason) {
  std::fprintf(stderr, "cuda_shim: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, reason);
  std::abort();
}

inline void enter() {
  kernel();
  lanes[current].ended = true;
}

__attribute__((noinline)) unsigned collective(unsigned mask, unsigned value,
                                              Combine combine_lanes) {
  if (mask != 0xffffffffu) die("a collective of a part of the warp");
  Lane& lane = lanes[current];
  lane.value = value;
  lane.place = __builtin_return_address(0);
  combine = combine_lanes;
  swapcontext(&lane.context, &scheduler);
  return result;
}

// Of all lanes at a time: a lane that runs on may bring its next number before another has taken
// this one.
inline void shuffle() {
  for (int i = 0; i < kLanes; ++i) {
    const int from = i + static_cast<int>(lanes[i].distance);
    lanes[i].found = lanes[from < kLanes ? from : i].number;
  }
}

inline __attribute__((always_inline)) double shuffle_down(unsigned mask, double number,
                                                          unsigned distance) {
  const int own = current;
  lanes[own].number = number;
  lanes[own].distance = distance;
  collective(mask, 0, any);
  return lanes[own].found;
}

inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    lane.ended = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, enter, 0);
  }
  for (bool forward = true;; forward = !forward) {
    int ended = 0;
    for (int turn = 0; turn < kLanes; ++turn) {
      current = forward ? turn : kLanes - 1 - turn;
      threadIdx.x = first_thread + static_cast<unsigned>(current);
      if (torn != nullptr) *torn ^= 1u;
      swapcontext(&scheduler, &lanes[current].context);
      ended += lanes[current].ended;
    }
    if (ended == kLanes) return;
    if (ended != 0) die("some lanes of the warp ended, others wait for them");
    result = lanes[0].value;
    for (int i = 1; i < kLanes; ++i) {
      if (lanes[i].place != lanes[0].place) die("lanes of the warp wait at different collectives");
      result = combine(result, lanes[i].value);
    }
    shuffle();
  }
}

inline void launch(unsigned grid, unsigned block, std::function<void()> body) {
  if (block == 0 || block % kLanes != 0) die("a block that is not made of whole warps");
  gridDim.x = grid;
  blockDim.x = block;
  kernel = std::move(body);
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
    for (unsigned thread = 0; thread < block; thread += kLanes) run_warp(thread);
}

inline unsigned bits_of(float a) {
  unsigned bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}

inline float from_bits(unsigned bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

// cvt.rn.f16.f32, up to the largest number of half precision: to nearest, ties to even.
inline unsigned half_of(float a) {
  const unsigned sign = bits_of(a) >> 16 & 0x8000u, magnitude = bits_of(a) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;  // NaN
  if (magnitude < 0x38800000u)  // denormal, in units of 2^-24: those of a float from 1/2 on
    return sign | (bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f));
  return sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) - (112u << 23)) >> 13;
}

// cvt.f32.f16.
inline float float_of(unsigned half) {
  const unsigned sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude < 0x0400u) {
    const float a = static_cast<float>(magnitude) * 0x1p-24f;
    return from_bits(sign | bits_of(a));
  }
  return from_bits(sign | ((magnitude << 13) + (magnitude < 0x7c00u ? 112u : 224u) * 0x800000u));
}

}  // namespace shim

#define __reduce_add_sync(mask, value) shim::collective(mask, value, shim::sum)
#define __reduce_or_sync(mask, value) shim::collective(mask, value, shim::any)
#define __reduce_max_sync(mask, value) shim::collective(mask, value, shim::larger)
#define __shfl_down_sync(mask, value, distance) shim::shuffle_down(mask, value, distance)
#define __all_sync(mask, value) shim::collective(mask, (value) ? 1u : 0u, shim::both)
