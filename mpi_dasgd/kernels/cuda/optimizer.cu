// A step of an optimizer on a GPU that is made alone. A warp takes 512 elements at a time.
#include "optimizer.h"

// Argument of a launch, passed by value; mirrored in kernels/cuda/optimizer.py.
struct MpdOptimizerArguments {
  float* x;
  long long elements;
  MpdOptimizer optimizer;
};

template <int KIND>
MPD_DEVICE void step(const MpdOptimizerArguments& args) {
  const long long warps = static_cast<long long>(gridDim.x) * (blockDim.x / 32u);
  const long long warp =
      static_cast<long long>(blockIdx.x) * (blockDim.x / 32u) + threadIdx.x / 32u;
  for (long long first = warp * 512; first < args.elements; first += warps * 512) {
    const long long left = args.elements - first;
    float x[4][4];
    load(x, args.x + first, left);
    if (optimize<KIND>(args.optimizer, first, left, x)) store(x, args.x + first, left);
  }
}

#define MPD_STEP(name, kind)                                           \
  extern "C" __global__ void __launch_bounds__(MPD_THREADS, 2)         \
      mpd_##name(const __grid_constant__ MpdOptimizerArguments args) { \
    step<kind>(args);                                                  \
  }

#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 1
MPD_STEP(sgd, kSgd)
#endif
#if !defined(MPD_OPTIMIZER) || MPD_OPTIMIZER == 2
MPD_STEP(adam, kAdam)
#endif
