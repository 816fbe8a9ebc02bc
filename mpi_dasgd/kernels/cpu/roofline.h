// Roofline loops that `bench kernel` measures the lattice codec against. Python mirrors the enum in
// kernels/cpu/__init__.py.
#ifndef MPD_CPU_ROOFLINE_H
#define MPD_CPU_ROOFLINE_H
#include "fused_step.h"

enum MpdRooflinePass : int32_t {
  kTrivial,   // the memory traffic of a step with almost no arithmetic
  kStreamed,  // the same, its codes written past the caches
  kCopy,      // x -> scratch
  kTriad,     // state + 3 gradient -> scratch, of a step with an optimizer
  // The work of a step in separate passes:
  kDecode,      // partner_model against x -> scratch
  kStatistics,  // squared distances of x and scratch -> stats
  kDifference,  // (scratch - x) / scale -> reply_delta
  kMove,        // x + unit reply_delta -> x
  kAverage,     // x + weight (scratch - x) -> x
};

// Does a pass on buckets first .. last - 1; `scratch` has the length of the model.
typedef void (*MpdRooflineRange)(const MpdFusedStep*, int32_t pass, float* scratch, int64_t first,
                                 int64_t last);

#endif
