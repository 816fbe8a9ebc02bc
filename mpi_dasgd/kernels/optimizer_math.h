// One element of an optimizer's step, shared by the CPU library and the CUDA kernels. No system
// header: NVRTC has none.
//
// The bits are those of torch.optim: SGD as it always is, Adam and AdamW as with fused=True (of which
// torch compiles the formula with contraction: where it has become a fused multiply-add, one is
// written here). Scalars come as torch rounds them: computed in double, then rounded to float32.
// Torch is 2.13 for x86-64, with AVX2 or AVX-512.
#ifndef MPD_OPTIMIZER_MATH_H
#define MPD_OPTIMIZER_MATH_H

#include "exact_math.h"

enum MpdOptimizerKind { kSgd = 1, kAdam = 2 };

enum MpdOptimizerFlags {
  kNesterov = 1,
  kDecay = 2,      // weight_decay != 0
  kDecoupled = 4,  // AdamW: the model decays, not the gradient
  kMaximize = 8,
  kMomentum = 16,  // SGD: momentum != 0
  kFirst = 32,     // SGD: there is no momentum buffer yet: it becomes the gradient
  kFactor = 64,    // factor != 1
  kAmsgrad = 128,
  kTail = 256,  // torch's kernel has a scalar loop for the end of a parameter
};

// Elements that torch's fused kernels take at a time, also with AVX-512: with kTail, those of a
// segment behind the last whole multiple have the formula of the scalar loop, in which another of
// two products has become part of the fused multiply-add.
#define MPD_TORCH_VECTOR 8

// Scalars of the parameters that have them alike in this step.
struct MpdOptimizerGroup {
  int kind, flags;
  float factor;    // on the gradient, before all else
  float decay;     // weight_decay; decoupled: 1 - lr weight_decay
  float momentum;  // SGD: momentum. Adam: beta2
  float fresh;     // SGD: 1 - dampening. Adam: 1 - beta2
  float lerp;      // Adam: 1 - beta1
  float rate;      // -lr; Adam: -lr / (1 - beta1^t)
  float root;      // Adam: sqrt(1 - beta2^t)
  float eps;
};

// A parameter: a part of the flat vectors, with a gradient of its own. They are in order, and do not
// overlap; elements between them are left alone.
struct MpdOptimizerSegment {
  long long offset, count;
  const float* gradient;  // null: it has none in this step, and is left out
  long long group;
};

// A step of an optimizer.
struct MpdOptimizer {
  const MpdOptimizerSegment* segments;
  long long segment_count;
  const MpdOptimizerGroup* groups;
  float* first;          // momentum buffer, or exp_avg; null: there is none
  float* second;         // exp_avg_sq, likewise
  float* third;          // max_exp_avg_sq, likewise
  long long* nonfinite;  // set to 1 if an element of the model is infinite or NaN after the step
};

// Returns the element of a segment's flat vectors at which torch's scalar loop begins.
MPD_HD long long mpd_tail(const MpdOptimizerSegment& segment, int flags) {
  const long long left = flags & kTail ? segment.count % MPD_TORCH_VECTOR : 0;
  return segment.offset + segment.count - left;
}

// `flags` are those of the group, with kTail only in the tail. `velocity` is written only with
// kMomentum.
MPD_HD void mpd_sgd(int flags, const MpdOptimizerGroup& group, float gradient, float& velocity,
                    float& x) {
  float g = gradient;
  if (flags & kFactor) g = mpd_mul(g, group.factor);
  if (flags & kMaximize) g = mpd_negative(g);
  if (flags & kDecay) g = mpd_fma(x, group.decay, g);
  if (flags & kMomentum) {
    if (flags & kFirst)
      velocity = g;
    else if (flags & kTail)
      velocity = mpd_fma(velocity, group.momentum, mpd_mul(g, group.fresh));
    else
      velocity = mpd_fma(g, group.fresh, mpd_mul(velocity, group.momentum));
    g = flags & kNesterov ? mpd_fma(velocity, group.momentum, g) : velocity;
  }
  x = mpd_fma(g, group.rate, x);
}

// `largest` (max_exp_avg_sq) is read and written only with kAmsgrad.
MPD_HD void mpd_adam(int flags, const MpdOptimizerGroup& group, float gradient, float& mean,
                     float& square, float& largest, float& x) {
  float g = gradient;
  if (flags & kFactor) g = mpd_mul(g, group.factor);
  if (flags & kMaximize) g = mpd_negative(g);
  if (flags & kDecay) {
    if (flags & kDecoupled)
      x = mpd_mul(x, group.decay);
    else
      g = mpd_fma(x, group.decay, g);
  }
  const float apart = mpd_sub(g, mean);
  const bool small = mpd_bits(group.lerp) < mpd_bits(0.5f);  // torch.lerp
  mean = mpd_fma(small ? group.lerp : mpd_sub(group.lerp, 1.0f), apart, small ? mean : g);
  const float part = mpd_mul(group.fresh, g);
  if (flags & kTail)
    square = mpd_fma(square, group.momentum, mpd_mul(part, g));
  else
    square = mpd_fma(part, g, mpd_mul(square, group.momentum));
  float u = square;
  if (flags & kAmsgrad) largest = u = mpd_greater(square, largest) ? square : largest;
  const float denominator = mpd_add(mpd_divide(mpd_sqrt(u), group.root), group.eps);
  x = mpd_add(x, mpd_divide(mpd_mul(group.rate, mean), denominator));
}

// With flags that are a constant.
template <int FLAGS>
MPD_HD void mpd_sgd(const MpdOptimizerGroup& group, float gradient, float& velocity, float& x) {
  mpd_sgd(FLAGS, group, gradient, velocity, x);
}
template <int FLAGS>
MPD_HD void mpd_adam(const MpdOptimizerGroup& group, float gradient, float& mean, float& square,
                     float& largest, float& x) {
  mpd_adam(FLAGS, group, gradient, mean, square, largest, x);
}

#endif
