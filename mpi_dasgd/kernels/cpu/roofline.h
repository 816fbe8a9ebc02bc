// What `bench kernel` measures the lattice codec against. Python mirrors the enum in kernels/cpu/__init__.py.
#ifndef MPD_CPU_YARDSTICK_H
#define MPD_CPU_YARDSTICK_H
#include "fused_step.h"

enum MpdPass : int32_t {
  kTrivial,    // the traffic of a step with next to no arithmetic
  kStreamed,   // the same, its codes written past the caches
  kCopy,       // x -> room
  kTriad,      // velocity + 3 gradient -> room
  kDecode,     // from here on, the work of a step in separate passes: theirs against x -> room
  kStatistics, // squared distances of x and room -> found
  kDifference, // (room - x) / scale -> reply
  kMove,       // x + unit reply -> x
  kAverage,    // x + weight (room - x) -> x
};

// Does buckets first .. last - 1 of a pass; `room` has the length of the model.
typedef void (*MpdYardstick)(const MpdStep*, int32_t pass, float* room, int64_t first, int64_t last);

#endif
