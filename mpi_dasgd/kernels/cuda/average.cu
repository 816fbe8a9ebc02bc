// Pair averaging on a GPU in one pass over memory: unquantized models, and those of bf16 and fp16.
//
// The step of an optimizer comes first. Then, element by element, in this order, every operation rounded once:
//     v = x;  v = v + decode(deltas[0]);  v = v + decode(deltas[1]); ...
//     d = decode(partner_model) - v;  square += d d;  d = d (-weight)
//     reply_delta = encode(d);  d = decode(reply_delta);  v = v - d
//     x = v;  publication = encode(v)
// ElementwiseCodec (codecs/elementwise.py) gives the same bits, and for unquantized models
// pair_average_numpy (kernels/pair_average.py), since v - d (-w) is v + d w. `square` is summed in
// another order.
#include "optimizer.h"

// Argument of a launch, passed by value; mirrored in kernels/cuda/pair_average.py. Null pointers
// leave their part of the work out. Payloads are of the kernel's format.
struct MpdAverageArguments {
  float* x;
  long long elements;
  const void* partner_model;
  const void* deltas[MPD_MAX_DELTAS];
  void *reply_delta, *publication;
  double* partial;  // per warp: squared distance
  double* square;   // of the whole model
  float minus_weight;
  int delta_count;
  int warps;  // of the launch before
  MpdOptimizer optimizer;
};

// A warp's part of a vector: QUADS times 128 elements, of which lane l has 4 l .. 4 l + 3 each.
#define MPD_QUADS 4
typedef float Quads[MPD_QUADS][4];

struct Float32 {
  static constexpr bool kRounds = false;
  MPD_DEVICE void load_from(Quads& values, const void* payload, long long first, long long left) {
    load(values, static_cast<const float*>(payload) + first, left);
  }
  MPD_DEVICE void store_to(const Quads& values, void* payload, long long first, long long left) {
    store(values, static_cast<float*>(payload) + first, left);
  }
};

// Formats of 16 bits, whose elements are loaded and stored 4 at a time.
template <class Format>
struct Halves {
  static constexpr bool kRounds = true;

  MPD_DEVICE void load_from(Quads& values, const void* payload, long long first, long long left) {
    const unsigned short* from = static_cast<const unsigned short*>(payload) + first + lane() * 4;
    if (left >= MPD_QUADS * 128) {
#pragma unroll
      for (int k = 0; k < MPD_QUADS; ++k) {
        const uint2 quad = *reinterpret_cast<const uint2*>(from + k * 128);
        values[k][0] = Format::decode(quad.x & 0xffffu);
        values[k][1] = Format::decode(quad.x >> 16);
        values[k][2] = Format::decode(quad.y & 0xffffu);
        values[k][3] = Format::decode(quad.y >> 16);
      }
      return;
    }
    const int end = static_cast<int>(left) - static_cast<int>(lane()) * 4;
#pragma unroll
    for (int k = 0; k < MPD_QUADS; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        values[k][i] = k * 128 + i < end ? Format::decode(from[k * 128 + i]) : 0.0f;
  }

  // `values` have been rounded.
  MPD_DEVICE void store_to(const Quads& values, void* payload, long long first, long long left) {
    unsigned short* to = static_cast<unsigned short*>(payload) + first + lane() * 4;
    if (left >= MPD_QUADS * 128) {
#pragma unroll
      for (int k = 0; k < MPD_QUADS; ++k)
        *reinterpret_cast<uint2*>(to + k * 128) =
            make_uint2(Format::encode(values[k][0]) | Format::encode(values[k][1]) << 16,
                       Format::encode(values[k][2]) | Format::encode(values[k][3]) << 16);
      return;
    }
    const int end = static_cast<int>(left) - static_cast<int>(lane()) * 4;
#pragma unroll
    for (int k = 0; k < MPD_QUADS; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (k * 128 + i < end)
          to[k * 128 + i] = static_cast<unsigned short>(Format::encode(values[k][i]));
  }
};

// The upper half of float32, rounded to nearest, ties to even; NaN stays NaN.
struct BFloat16 : Halves<BFloat16> {
  MPD_DEVICE mpd_u32 encode(float a) {
    const mpd_u32 bits = mpd_bits(a);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits | 0x400000u) >> 16;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  MPD_DEVICE float decode(mpd_u32 code) { return mpd_float(code << 16); }
};

// IEEE half precision, rounded to nearest, ties to even; beyond 65504 it saturates.
struct Float16 : Halves<Float16> {
  MPD_DEVICE mpd_u32 encode(float a) {
    a = a > 65504.0f ? 65504.0f : a;  // not max and min, which would make NaN a number
    a = a < -65504.0f ? -65504.0f : a;
#if defined(__CUDA_ARCH__)
    unsigned short code;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(code) : "f"(a));
    return code;
#else
    return shim::half_of(a);  // tests/support/cuda_shim.h
#endif
  }
  MPD_DEVICE float decode(mpd_u32 code) {
#if defined(__CUDA_ARCH__)
    float a;
    asm("cvt.f32.f16 %0, %1;" : "=f"(a) : "h"(static_cast<unsigned short>(code)));
    return a;
#else
    return shim::float_of(code);
#endif
  }
};

// Averages, and returns the lane's part of the squared distance.
template <class Format>
MPD_DEVICE double average(const MpdAverageArguments& args, long long first, long long left,
                          Quads& v) {
  Quads d;
  Format::load_from(d, args.partner_model, first, left);
  double square = 0.0;
#pragma unroll
  for (int k = 0; k < MPD_QUADS; ++k) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float difference = mpd_sub(d[k][i], v[k][i]);
      sum = mpd_add(sum, mpd_mul(difference, difference));
      d[k][i] = mpd_mul(difference, args.minus_weight);
    }
    square += widen(sum);
  }
  if (args.reply_delta != nullptr) {
    if constexpr (Format::kRounds)
#pragma unroll
      for (int k = 0; k < MPD_QUADS; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[k][i] = Format::decode(Format::encode(d[k][i]));
    Format::store_to(d, args.reply_delta, first, left);
  }
#pragma unroll
  for (int k = 0; k < MPD_QUADS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) v[k][i] = mpd_sub(v[k][i], d[k][i]);
  return square;
}

// OPTIMIZER is the kind of the optimizer whose step comes first; 0: there is none.
template <class Format, int OPTIMIZER = 0>
MPD_DEVICE void models(const MpdAverageArguments& args) {
  const long long warps = static_cast<long long>(gridDim.x) * (blockDim.x / 32u);
  const long long warp =
      static_cast<long long>(blockIdx.x) * (blockDim.x / 32u) + threadIdx.x / 32u;
  double square = 0.0;
  for (long long first = warp * (MPD_QUADS * 128); first < args.elements;
       first += warps * (MPD_QUADS * 128)) {
    const long long left = args.elements - first;
    Quads v;
    load(v, args.x + first, left);
    bool changed = args.partner_model != nullptr || args.delta_count > 0;
    if constexpr (OPTIMIZER != 0) changed |= optimize<OPTIMIZER>(args.optimizer, first, left, v);
#pragma unroll 1
    for (int a = 0; a < args.delta_count; ++a) {
      Quads delta;
      Format::load_from(delta, args.deltas[a], first, left);
#pragma unroll
      for (int k = 0; k < MPD_QUADS; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) v[k][i] = mpd_add(v[k][i], delta[k][i]);
    }
    if (args.partner_model != nullptr) square += average<Format>(args, first, left, v);
    if (changed) store(v, args.x + first, left);
    if (args.publication != nullptr) Format::store_to(v, args.publication, first, left);
  }
  if (args.partial == nullptr) return;
  square = warp_total(square);
  if (lane() == 0) args.partial[warp] = square;
}

#define MPD_AVERAGE(name, ...)                                               \
  extern "C" __global__ void __launch_bounds__(MPD_THREADS, 2)               \
      mpd_average_##name(const __grid_constant__ MpdAverageArguments args) { \
    models<__VA_ARGS__>(args);                                               \
  }

// As in lattice.cu.
#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 0
MPD_AVERAGE(none, Float32)
MPD_AVERAGE(bf16, BFloat16)
MPD_AVERAGE(fp16, Float16)

// One warp. `square` may be memory of the host.
extern "C" __global__ void __launch_bounds__(MPD_THREADS)
    mpd_square(const __grid_constant__ MpdAverageArguments args) {
  if (blockIdx.x != 0 || threadIdx.x >= 32) return;
  const double square = total_of<1>(args.partial, args.warps);
  if (lane() == 0) *args.square = square;
}
#endif
#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 1
MPD_AVERAGE(none_sgd, Float32, kSgd)
MPD_AVERAGE(bf16_sgd, BFloat16, kSgd)
MPD_AVERAGE(fp16_sgd, Float16, kSgd)
#endif
#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 2
MPD_AVERAGE(none_adam, Float32, kAdam)
MPD_AVERAGE(bf16_adam, BFloat16, kAdam)
MPD_AVERAGE(fp16_adam, Float16, kAdam)
#endif
