// Arguments of one fused step on the CPU: what the dispatcher, the objects compiled per instruction
// set and Python agree on. Python mirrors the struct in kernels/cpu/__init__.py.
#ifndef MPD_CPU_FUSED_STEP_H
#define MPD_CPU_FUSED_STEP_H
#include <cstdint>

#include "../layout.h"
#include "../optimizer_math.h"

// Every pointer but the model may be null: that part of the work is left out.
struct MpdFusedStep {
  int64_t bits;
  float* x;  // model, `elements` long
  int64_t elements;
  const MpdOptimizer* optimizer;          // its step is made before all else
  const MpdEncodedVector* const* deltas;  // to apply first, in this order
  MpdBucketStats* const* delta_stats;
  int64_t delta_count;
  const MpdEncodedVector* partner_model;  // publication to exchange or to merge with
  float weight;
  int32_t
      merge;  // 0: exchange on the lattice; 1: plain average; 2: plain average, dither subtracted
  MpdBucketStats* stats;
  MpdEncodedVector* reply_delta;  // exchange: receives the partner's delta
  int32_t threads;
  MpdEncodedVector* publication;  // receives the codes of the new model; its scales are given
};

// Does a step on buckets first .. last - 1.
typedef void (*MpdFusedStepRange)(const MpdFusedStep*, int64_t first, int64_t last);

#endif
