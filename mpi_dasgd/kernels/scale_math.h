// The adaptive scale of one bucket, shared by the CPU library and the CUDA kernels: the operations of
// AdaptiveScale (codecs/bucket_scale.py) in their order, each rounded once. No system header: NVRTC
// has none.
#ifndef MPD_SCALE_MATH_H
#define MPD_SCALE_MATH_H

#include "exact_math.h"

#define MPD_MIN_ESTIMATE 1e-30f
#define MPD_MAX_ESTIMATE 1e30f

// By the bits: a comparison of floats would flush denormal numbers to zero before.
MPD_HD bool mpd_is_zero(float a) { return (mpd_bits(a) & 0x7fffffffu) == 0; }

MPD_HD float mpd_next_scale(float estimate, float floor, float scale_per_distance) {
  return mpd_larger(mpd_mul(estimate, scale_per_distance), floor);
}

// The largest distance in a bucket whose statistics are `max_d2`, in units of `unit`. A delta's
// units are negative.
MPD_HD float mpd_distance(mpd_u32 max_d2, float unit) {
  const float magnitude = mpd_float(mpd_bits(unit) & 0x7fffffffu);
  return mpd_mul(mpd_sqrt(mpd_from_integer(max_d2)), magnitude);
}

// Parameters of the estimates of all buckets.
struct MpdEstimation {
  float scale_per_distance, decay;
  float max_estimate;     // that a rejection may raise it to
  bool doubles_estimate;  // a rejection doubles the own estimate, too
};

// The estimate after an exchange. `scale` is that of the publication that was decoded.
MPD_HD float mpd_observe(float estimate, float distance, bool rejected, float scale,
                         const MpdEstimation& parameters) {
  estimate = mpd_larger(distance, mpd_mul(estimate, parameters.decay));
  if (!rejected) return estimate;
  const float implied = mpd_divide(scale, parameters.scale_per_distance);
  const float own = mpd_divide(estimate, parameters.decay);
  const float base = parameters.doubles_estimate ? mpd_larger(implied, own) : implied;
  return mpd_larger(own, mpd_smaller(mpd_mul(2.0f, base), parameters.max_estimate));
}

// Smallest scale of a bucket, relative to its largest |x|; first guess of a distance, likewise.
MPD_HD float mpd_floor(float largest) {
  return mpd_larger(mpd_mul(largest, 0x1p-21f), MPD_MIN_ESTIMATE);
}
MPD_HD float mpd_guess(float largest, float overall) {
  const float guess = mpd_mul(mpd_is_zero(largest) ? overall : largest, 0x1p-4f);
  return mpd_smaller(mpd_larger(guess, MPD_MIN_ESTIMATE), MPD_MAX_ESTIMATE);
}

#endif
