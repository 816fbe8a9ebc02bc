// What the instruction sets' objects and their dispatcher agree on. Python mirrors the structs in kernels/cpu/__init__.py.
#ifndef MPD_CPU_LATTICE_H
#define MPD_CPU_LATTICE_H
#include <cstdint>

struct MpdMessage {
  void* codes;       // 1024 (4 bits: 512) bytes a bucket, twice as many for 16 bits
  float* scales;     // one a bucket
  uint32_t* checks;  // one a bucket
  uint64_t seed;
  int64_t nearest;   // whether codes are rounded to the nearest instead of with dither
};

struct MpdFound {
  uint32_t rejected;  // 1 if the bucket failed its check or its range: the model was left as it is
  uint32_t max_d2;    // largest squared distance in units of the scale; 0 if rejected
  uint64_t sum_d2;    // their sum
};

// Every pointer but the model may be null: that part of the work is left out.
struct MpdStep {
  int64_t bits;
  float* x;  // model, `elements` long
  int64_t elements;
  const MpdMessage* const* arrived;  // deltas to apply first, in this order
  MpdFound* const* arrived_found;
  int64_t arrivals;
  const MpdMessage* theirs;  // publication to exchange or to merge with
  float weight;
  int32_t merge;  // 0: exchange on the lattice; 1: plain average; 2: plain average, dither subtracted
  MpdFound* found;
  MpdMessage* reply;  // exchange: receives the partner's delta
  float* velocity;    // SGD before all else: v = momentum v + (gradient + decay x);  x = x - rate v
  const float* gradient;
  float rate, momentum, decay;
  int32_t threads;
  MpdMessage* published;  // receives the new model; its scales are given
};

// Does buckets first .. last - 1.
typedef void (*MpdBuckets)(const MpdStep*, int64_t first, int64_t last);

#endif
