// The optimizer's stage of a pass. Each object compiled for an instruction set has its own copy;
// mpd_optimizer_range is that of the active one.
#ifndef MPD_CPU_OPTIMIZER_H
#define MPD_CPU_OPTIMIZER_H
#include <cstdint>

#include "../optimizer_math.h"

// Makes the step on elements begin .. end - 1 of the model, of which `x` is the first, and looks
// whether they are finite. `segment` is the first segment that may reach into them, and becomes that
// of the elements behind them; negative: it is looked for.
typedef void (*MpdOptimizerRange)(const MpdOptimizer*, float* x, int64_t begin, int64_t end,
                                  int64_t* segment);

extern "C" void mpd_optimizer_range(const MpdOptimizer*, float* x, int64_t begin, int64_t end,
                                    int64_t* segment);

#endif
