// The optimizer's stage of a pass over a model: the formulas of optimizer_math.h on the elements that
// the lanes of a warp hold in registers.
#ifndef MPD_CUDA_OPTIMIZER_H
#define MPD_CUDA_OPTIMIZER_H

#include "../optimizer_math.h"
#include "lane.h"

// Index of the first parameter that ends behind an element of the model.
MPD_DEVICE int segment_behind(const MpdOptimizer& step, long long element) {
  int low = 0, high = static_cast<int>(step.segment_count);
  while (low < high) {
    const int middle = (low + high) / 2;
    const MpdOptimizerSegment& segment = step.segments[middle];
    if (segment.offset + segment.count > element)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// A part of a parameter, as the lanes see it: the elements from `begin` to `end` of the next 128
// QUADS, which begin at element `first` of the model, `left` before its end.
struct ParameterPart {
  long long first, left;
  int begin, end;
  const float* gradient;  // where that of element `first` would be
};

MPD_DEVICE bool is_in(const ParameterPart& part, int k, int i) {
  const int j = k * 128 + static_cast<int>(lane()) * 4 + i;
  return j >= part.begin && j < part.end;
}

// Loads the gradient of a part; zeros outside of it, where there may be no memory.
template <int QUADS>
MPD_DEVICE void load_gradient(float (&g)[QUADS][4], const ParameterPart& part) {
  const bool in_quads = (reinterpret_cast<mpd_u64>(part.gradient) & 15u) == 0;
  if (in_quads && part.end - part.begin == QUADS * 128) {
#pragma unroll
    for (int k = 0; k < QUADS; ++k) load_quad(g[k], part.gradient + k * 128 + lane() * 4);
    return;
  }
#pragma unroll
  for (int k = 0; k < QUADS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      g[k][i] = is_in(part, k, i) ? part.gradient[k * 128 + lane() * 4 + i] : 0.0f;
}

// The step on a part; state outside of it is stored as it was loaded.
template <int QUADS>
MPD_DEVICE void sgd(const MpdOptimizer& step, const MpdOptimizerGroup& group,
                    const ParameterPart& part, float (*x)[4]) {
  float g[QUADS][4], velocity[QUADS][4] = {};
  load_gradient(g, part);
  if (group.flags & kMomentum) load(velocity, step.first + part.first, part.left);
#pragma unroll
  for (int k = 0; k < QUADS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v = velocity[k][i], y = x[k][i];
      mpd_sgd(group.flags, group, g[k][i], v, y);
      velocity[k][i] = is_in(part, k, i) ? v : velocity[k][i];
      x[k][i] = is_in(part, k, i) ? y : x[k][i];
    }
  if (group.flags & kMomentum) store(velocity, step.first + part.first, part.left);
}

template <int QUADS>
MPD_DEVICE void adam(const MpdOptimizer& step, const MpdOptimizerGroup& group,
                     const ParameterPart& part, float (*x)[4]) {
  float g[QUADS][4], mean[QUADS][4], square[QUADS][4], largest[QUADS][4] = {};
  load_gradient(g, part);
  load(mean, step.first + part.first, part.left);
  load(square, step.second + part.first, part.left);
  if (group.flags & kAmsgrad) load(largest, step.third + part.first, part.left);
#pragma unroll
  for (int k = 0; k < QUADS; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float m = mean[k][i], s = square[k][i], u = largest[k][i], y = x[k][i];
      mpd_adam(group.flags, group, g[k][i], m, s, u, y);
      mean[k][i] = is_in(part, k, i) ? m : mean[k][i];
      square[k][i] = is_in(part, k, i) ? s : square[k][i];
      largest[k][i] = is_in(part, k, i) ? u : largest[k][i];
      x[k][i] = is_in(part, k, i) ? y : x[k][i];
    }
  store(mean, step.first + part.first, part.left);
  store(square, step.second + part.first, part.left);
  if (group.flags & kAmsgrad) store(largest, step.third + part.first, part.left);
}

// Makes the step on the next 128 QUADS elements, which begin at element `first` of the model, `left`
// before its end: for the parameters whose groups are of this kind. Returns whether there are any.
template <int KIND, int QUADS>
MPD_DEVICE bool optimize(const MpdOptimizer& step, long long first, long long left,
                         float (&x)[QUADS][4]) {
  constexpr int kQuads = KIND == kSgd ? 4 : 2;  // at a time: more do not fit into the registers
  bool changed = false;
  // A segment in two pieces: all but its tail, and that.
#pragma unroll 1
  for (int piece = 2 * segment_behind(step, first); piece < 2 * step.segment_count; ++piece) {
    const MpdOptimizerSegment segment = step.segments[piece / 2];
    if (segment.offset >= first + QUADS * 128) break;
    MpdOptimizerGroup group = step.groups[segment.group];
    if (segment.gradient == nullptr || group.kind != KIND) continue;
    changed = true;
    const long long tail = mpd_tail(segment, group.flags);
    const bool is_tail = piece % 2 != 0;
    const long long last = is_tail ? segment.offset + segment.count : tail;
    // A factor of 1 is exact, and so is one of -1.
    if (group.flags & kMaximize) group.factor = mpd_negative(group.factor);
    group.flags = (group.flags & ~(kMaximize | kTail)) | kFactor | (is_tail ? kTail : 0);
#pragma unroll
    for (int k = 0; k < QUADS; k += kQuads) {
      const long long from = first + k * 128;
      const long long begin = (is_tail ? tail : segment.offset) - from, end = last - from;
      if (begin >= kQuads * 128 || end <= 0 || begin >= end) continue;
      const ParameterPart part = {from, left - k * 128, begin > 0 ? static_cast<int>(begin) : 0,
                                  end < kQuads * 128 ? static_cast<int>(end) : kQuads * 128,
                                  segment.gradient + (from - segment.offset)};
      if (KIND == kSgd)
        sgd<kQuads>(step, group, part, x + k);
      else
        adam<kQuads>(step, group, part, x + k);
    }
  }
  return changed;
}

#endif
