// The optimizer's stage of a pass. Each object compiled for an instruction set has its own copy;
// mpd_optimizer_range is that of the active one.
#ifndef MPD_CPU_OPTIMIZER_H
#define MPD_CPU_OPTIMIZER_H
#include <cstdint>

#include "../optimizer_math.h"

// Makes the step on elements begin .. end - 1 of the model, of which `x` is the first, and looks
// whether they are finite. `segment` is the first segment that may reach into them, and becomes that
// of the elements behind them; negative: it is looked for. With
// `ahead` the stage asks for what the next bucket of it will read.
typedef void (*MpdOptimizerRange)(const MpdOptimizer*, float* x, int64_t begin, int64_t end,
                                  int64_t* segment, int ahead);

extern "C" void mpd_optimizer_range(const MpdOptimizer*, float* x, int64_t begin, int64_t end,
                                    int64_t* segment, int ahead);

// Returns where the gradient of an element lies, of which segment `segment` or one behind it is; null
// if it has none.
inline const float* gradient_at(const MpdOptimizer& step, int64_t segment, int64_t element) {
  for (; segment < step.segment_count; ++segment) {
    const MpdOptimizerSegment& part = step.segments[segment];
    if (part.offset > element) return nullptr;
    if (element < part.offset + part.count)
      return part.gradient == nullptr ? nullptr : part.gradient + (element - part.offset);
  }
  return nullptr;
}

#endif
