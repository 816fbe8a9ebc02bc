// The scales of a lattice codec, and what an exchange teaches them: codecs/bucket_scale.py and
// codecs/lattice.py, with the same bits.
#include <algorithm>
#include <cmath>

#include "../scale_math.h"
#include "pair_codec.h"

namespace {

// The largest |x|; 0 if an element is infinite or NaN, whose bits are larger than those of numbers.
float largest_of(const float* x, int64_t count) {
  mpd_u32 bits = 0;
#pragma omp simd reduction(max : bits)
  for (int64_t j = 0; j < count; ++j) bits = std::max(bits, mpd_bits(x[j]) & 0x7fffffffu);
  const float largest = mpd_float(bits);
  return mpd_finite(largest) ? largest : 0.0f;
}

// AdaptiveScale._refresh_range.
void measure(MpdAdaptiveScale* scale, const float* x, int64_t elements) {
  float overall = 0.0f;
  bool is_estimated = false;
  const auto largest_in = [&](int64_t b) {
    return largest_of(x + b * MPD_BUCKET, std::min<int64_t>(MPD_BUCKET, elements - b * MPD_BUCKET));
  };
  for (int64_t b = 0; b < scale->buckets; ++b) {
    const float largest = largest_in(b);
    scale->floor[b] = mpd_floor(largest);
    overall = mpd_larger(overall, largest);
    is_estimated |= !mpd_is_zero(scale->estimate[b]);
  }
  if (scale->buckets == 0) return;
  if (mpd_is_zero(overall)) overall = 1.0f;  // all elements may be 0 at the start
  scale->max_estimate = mpd_mul(16.0f, overall);
  if (is_estimated) return;
  for (int64_t b = 0; b < scale->buckets; ++b)
    scale->estimate[b] = mpd_guess(largest_in(b), overall);
}

MpdEstimation parameters_of(const MpdAdaptiveScale& scale) {
  return {scale.scale_per_distance, scale.decay, scale.max_estimate, scale.doubles_estimate != 0};
}

}  // namespace

void mpd_next_scales(MpdAdaptiveScale* scale, const float* x, int64_t elements, float* out) {
  if (mpd_measures_next(*scale)) measure(scale, x, elements);
  ++scale->encodings;
  for (int64_t b = 0; b < scale->buckets; ++b)
    out[b] = scale->last[b] =
        mpd_next_scale(scale->estimate[b], scale->floor[b], scale->scale_per_distance);
}

void mpd_observe_delta(const MpdPairCodec& codec, const MpdBucketStats* stats, const float* units,
                       double weight) {
  MpdAdaptiveScale& scale = *codec.scale;
  const MpdEstimation parameters = parameters_of(scale);
  const float inverse = static_cast<float>(1 / weight);
  for (int64_t b = 0; b < scale.buckets; ++b) {
    codec.counts->corrupt += stats[b].rejected;
    const float unit = stats[b].rejected ? 0.0f : units[b];
    const float distance = mpd_mul(mpd_distance(stats[b].max_d2, unit), inverse);
    scale.estimate[b] =
        mpd_observe(scale.estimate[b], distance, mpd_is_zero(unit), scale.last[b], parameters);
  }
}

MpdObserved mpd_observe_publication(const MpdPairCodec& codec, const MpdBucketStats* stats,
                                    const float* scales) {
  MpdAdaptiveScale& scale = *codec.scale;
  const MpdEstimation parameters = parameters_of(scale);
  double square = 0;
  int64_t rejected = 0;
  for (int64_t b = 0; b < scale.buckets; ++b) {
    rejected += stats[b].rejected;
    const float known = stats[b].rejected ? 0.0f : scales[b];  // a rejected bucket's is arbitrary
    const float distance = mpd_distance(stats[b].max_d2, known);
    scale.estimate[b] =
        mpd_observe(scale.estimate[b], distance, stats[b].rejected != 0, scales[b], parameters);
    square += static_cast<double>(known) * known * static_cast<double>(stats[b].sum_d2);
  }
  codec.counts->decoded += scale.buckets - rejected;
  codec.counts->rejected += rejected;
  return {std::sqrt(square), rejected};
}
