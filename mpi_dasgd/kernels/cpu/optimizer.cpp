// The optimizer's stage of a pass on the CPU: the formulas of optimizer_math.h over a range of the
// model, a bucket or a block, whose elements the next stage then finds in the L1 cache.
//
// Compiled once per instruction set with MPD_ISA naming it; dispatch.cpp chooses at run time.
#include "optimizer.h"

#define MPD_NAME2(isa) mpd_optimizer_##isa
#define MPD_NAME(isa) MPD_NAME2(isa)

namespace {

// Part of the flat vectors, and of a gradient.
struct Part {
  float* x;
  const float* gradient;
  float *first, *second, *third;
  int64_t count;
};

constexpr int kStep = 64;  // elements that a loop processes between two prefetches

// Calls one(j) for all elements of a part. With `ahead` the elements a bucket further on are asked
// for meanwhile: the hardware does not look ahead beyond a page.
template <class One>
MPD_HD void for_each_element(const Part& part, bool ahead, One one) {
  const float* const streams[] = {part.x, part.gradient, part.first, part.second, part.third};
  int64_t first = 0;
  for (; first + kStep <= part.count; first += kStep) {
    if (ahead)
      for (const float* stream : streams)
        if (stream != nullptr)
          for (int o = 0; o < kStep; o += 16)
            __builtin_prefetch(stream + MPD_BUCKET + first + o, 0, 3);
#pragma omp simd
    for (int64_t j = first; j < first + kStep; ++j) one(j);
  }
#pragma omp simd
  for (int64_t j = first; j < part.count; ++j) one(j);
}

// kFactor stands for kMaximize, too: a product with -1 is exact.
template <int FLAGS>
void sgd(const MpdOptimizerGroup& scalars, const Part& part, bool ahead) {
  const MpdOptimizerGroup group = scalars;
  const float* __restrict gradient = part.gradient;
  float* __restrict x = part.x, * __restrict velocity = part.first;
  for_each_element(part, ahead, [&](int64_t j) __attribute__((always_inline)) {
    float v = (FLAGS & kMomentum) && !(FLAGS & kFirst) ? velocity[j] : 0.0f, y = x[j];
    mpd_sgd<FLAGS | kFactor>(group, gradient[j], v, y);
    if (FLAGS & kMomentum) velocity[j] = v;
    x[j] = y;
  });
}

template <int FLAGS>
void adam(const MpdOptimizerGroup& scalars, const Part& part, bool ahead) {
  const MpdOptimizerGroup group = scalars;
  const float* __restrict gradient = part.gradient;
  float* __restrict x = part.x, * __restrict mean = part.first;
  float* __restrict square = part.second, * __restrict largest = part.third;
  for_each_element(part, ahead, [&](int64_t j) __attribute__((always_inline)) {
    float m = mean[j], s = square[j], y = x[j];
    float most = FLAGS & kAmsgrad ? largest[j] : 0.0f;
    mpd_adam<FLAGS | kFactor>(group, gradient[j], m, s, most, y);
    mean[j] = m;
    square[j] = s;
    if (FLAGS & kAmsgrad) largest[j] = most;
    x[j] = y;
  });
}

// Runs the loop that is compiled for the flags of a group.
template <int... FLAGS>
void choose_sgd(const MpdOptimizerGroup& group, const Part& part, bool ahead) {
  const int flags = group.flags & (kDecay | kMomentum | kFirst | kNesterov);
  ((flags == (FLAGS & ~kTail) ? sgd<FLAGS>(group, part, ahead) : void()), ...);
}
template <int... FLAGS>
void choose_adam(const MpdOptimizerGroup& group, const Part& part, bool ahead) {
  const int flags = group.flags & (kDecay | kDecoupled | kAmsgrad);
  ((flags == (FLAGS & ~kTail) ? adam<FLAGS>(group, part, ahead) : void()), ...);
}

template <int TAIL>
void update(const MpdOptimizerGroup& group, const Part& part, bool ahead) {
  constexpr int kHeavy = kMomentum | TAIL, kNew = kMomentum | kFirst;
  if (group.kind == kSgd)
    choose_sgd<0, kDecay, kHeavy, kHeavy | kDecay, kHeavy | kNesterov, kHeavy | kNesterov | kDecay,
               kNew, kNew | kDecay, kNew | kNesterov, kNew | kNesterov | kDecay>(group, part,
                                                                                 ahead);
  else
    choose_adam<TAIL, TAIL | kDecay, TAIL | kDecay | kDecoupled, TAIL | kAmsgrad,
                TAIL | kAmsgrad | kDecay, TAIL | kAmsgrad | kDecay | kDecoupled>(group, part,
                                                                                 ahead);
}

bool all_finite(const float* __restrict x, int64_t count) {
  mpd_u32 found = 0;  // bit 31: an exponent of ones, with one more in its lowest bit
#pragma omp simd reduction(| : found)
  for (int64_t j = 0; j < count; ++j) found |= (mpd_bits(x[j]) & 0x7f800000u) + 0x00800000u;
  return found >> 31 == 0;
}

// Returns the first segment that ends behind element `begin`.
int64_t first_segment(const MpdOptimizer& step, int64_t begin) {
  int64_t low = 0, high = step.segment_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const MpdOptimizerSegment& segment = step.segments[middle];
    if (segment.offset + segment.count <= begin)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

float* at(float* vector, int64_t element) { return vector == nullptr ? nullptr : vector + element; }

// Makes the step on elements from .. to - 1, of which `x` is the first, of a segment.
void update(const MpdOptimizer& step, const MpdOptimizerSegment& segment, float* x, int64_t from,
            int64_t to, bool ahead) {
  MpdOptimizerGroup group = step.groups[segment.group];
  if (group.flags & kMaximize) group.factor = -group.factor;
  const int64_t tail = mpd_tail(segment, group.flags);
  const auto part = [&](int64_t first, int64_t last) {
    return Part{x + (first - from),    segment.gradient + (first - segment.offset),
                at(step.first, first), at(step.second, first),
                at(step.third, first), last - first};
  };
  if (from < tail) update<0>(group, part(from, to < tail ? to : tail), ahead);
  if (to > tail) update<kTail>(group, part(from > tail ? from : tail, to), ahead);
}

}  // namespace

extern "C" void MPD_NAME(MPD_ISA)(const MpdOptimizer* optimizer, float* x, int64_t begin,
                                  int64_t end, int64_t* segment, int ahead) {
  const MpdOptimizer& step = *optimizer;
  int64_t next = *segment < 0 ? first_segment(step, begin) : *segment;
  for (; next < step.segment_count && step.segments[next].offset < end; ++next) {
    const MpdOptimizerSegment& part = step.segments[next];
    const int64_t last = part.offset + part.count;
    const int64_t from = part.offset > begin ? part.offset : begin, to = last < end ? last : end;
    if (part.gradient != nullptr && from < to)
      update(step, part, x + (from - begin), from, to, ahead != 0);
    if (last > end) break;  // it goes on behind the range
  }
  *segment = next;
  if (!all_finite(x, end - begin)) __atomic_store_n(step.nonfinite, 1, __ATOMIC_RELAXED);
}
