// The adaptive scales of the lattice codec on a GPU: estimates, floors and scales of all buckets
// stay there. Warps do not work together within a launch: what a launch sums or maximizes it leaves
// as one value per warp, and the next launch combines them, in a fixed order.
#include "lane.h"
// after it
#include "../scale_math.h"

// The largest |x| that a warp has seen, as bits, and whether it has seen an estimate.
struct MpdRange {
  mpd_u32 largest, is_estimated;
};

// Argument of all kernels of this file, passed by value; mirrored in kernels/cuda/scale.py.
struct MpdScaleArguments {
  const float* x;
  long long elements, buckets;
  float *estimate, *floor, *last;  // per bucket
  float* max_estimate;             // one number
  float* largest;                  // per bucket: |x|
  MpdRange* ranges;                // per warp of mpd_measure
  double* partial;                 // per warp of mpd_learn: as totals
  double* totals;                  // buckets rejected, buckets corrupt, squared distance
  float* out;                      // per bucket: scales of the next publication
  const MpdBucketStats* delta_stats[MPD_MAX_DELTAS];
  const float* delta_units[MPD_MAX_DELTAS];
  const MpdBucketStats* stats;  // of the partner's publication; null: there is none
  const float* partner_scales;
  float scale_per_distance, decay, inverse_weight;
  int doubles_estimate, delta_count;
  int adds;   // mpd_learn: to the partial sums of a launch before
  int warps;  // of the launch before
};

MPD_DEVICE long long first_bucket_of_thread() {
  return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}
MPD_DEVICE long long threads_of_grid() { return static_cast<long long>(gridDim.x) * blockDim.x; }

// A warp measures a bucket at a time.
extern "C" __global__ void __launch_bounds__(MPD_THREADS, 2)
    mpd_measure(const __grid_constant__ MpdScaleArguments args) {
  const long long stride = threads_of_grid() / 32, warp = first_bucket_of_thread() / 32;
  MpdRange range = {0, 0};
  for (long long b = warp; b < args.buckets; b += stride) {
    Elements x;
    load(x, args.x + b * MPD_BUCKET, args.elements - b * MPD_BUCKET);
    mpd_u32 largest = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = larger(largest, mpd_bits(x[k][i]) & 0x7fffffffu);
    largest = warp_max(largest);
    if (largest >= 0x7f800000u) largest = 0;  // infinity or NaN
    range.largest = larger(range.largest, largest);
    if (!mpd_is_zero(args.estimate[b])) range.is_estimated = 1;
    if (lane() == 0) {
      args.largest[b] = mpd_float(largest);
      args.floor[b] = mpd_floor(mpd_float(largest));
    }
  }
  if (lane() == 0) args.ranges[warp] = range;
}

// A thread owns a bucket at a time, as in the kernels below.
extern "C" __global__ void __launch_bounds__(MPD_THREADS)
    mpd_guess_estimates(const __grid_constant__ MpdScaleArguments args) {
  MpdRange range = {0, 0};
  for (int w = static_cast<int>(lane()); w < args.warps; w += 32) {
    range.largest = larger(range.largest, args.ranges[w].largest);
    range.is_estimated |= args.ranges[w].is_estimated;
  }
  range = {warp_max(range.largest), warp_or(range.is_estimated)};
  const float overall = range.largest == 0 ? 1.0f : mpd_float(range.largest);
  long long b = first_bucket_of_thread();
  if (b == 0) *args.max_estimate = mpd_mul(16.0f, overall);
  if (range.is_estimated) return;
#pragma unroll 1
  for (; b < args.buckets; b += threads_of_grid())
    args.estimate[b] = mpd_guess(args.largest[b], overall);
}

extern "C" __global__ void __launch_bounds__(MPD_THREADS)
    mpd_next_scales(const __grid_constant__ MpdScaleArguments args) {
#pragma unroll 1
  for (long long b = first_bucket_of_thread(); b < args.buckets; b += threads_of_grid())
    args.out[b] = args.last[b] =
        mpd_next_scale(args.estimate[b], args.floor[b], args.scale_per_distance);
}

extern "C" __global__ void __launch_bounds__(MPD_THREADS)
    mpd_learn(const __grid_constant__ MpdScaleArguments args) {
  const MpdEstimation parameters = {args.scale_per_distance, args.decay, *args.max_estimate,
                                    args.doubles_estimate != 0};
  mpd_u32 rejected = 0, corrupt = 0;
  double square = 0.0;
#pragma unroll 1
  for (long long b = first_bucket_of_thread(); b < args.buckets; b += threads_of_grid()) {
    float estimate = args.estimate[b];
    const float last = args.last[b];
#pragma unroll 1
    for (int a = 0; a < args.delta_count; ++a) {
      const MpdBucketStats stats = args.delta_stats[a][b];
      // 0 where the partner has rejected the bucket, and taken as 0 where it has arrived corrupt.
      const float unit = stats.rejected ? 0.0f : args.delta_units[a][b];
      corrupt += stats.rejected != 0;
      const float distance = mpd_mul(mpd_distance(stats.max_d2, unit), args.inverse_weight);
      estimate = mpd_observe(estimate, distance, mpd_is_zero(unit), last, parameters);
    }
    if (args.stats != nullptr) {
      const MpdBucketStats stats = args.stats[b];
      const float scale = args.partner_scales[b];
      const float unit = stats.rejected ? 0.0f : scale;
      rejected += stats.rejected != 0;
      estimate = mpd_observe(estimate, mpd_distance(stats.max_d2, unit), stats.rejected != 0, scale,
                             parameters);
      square += widen(unit) * widen(unit) * static_cast<double>(stats.sum_d2);
    }
    args.estimate[b] = estimate;
  }
  const double sums[3] = {static_cast<double>(warp_sum(rejected)),
                          static_cast<double>(warp_sum(corrupt)), warp_total(square)};
  if (lane() != 0) return;
  double* partial = args.partial + 3 * (first_bucket_of_thread() / 32);
#pragma unroll
  for (int i = 0; i < 3; ++i) partial[i] = args.adds ? partial[i] + sums[i] : sums[i];
}

// One warp. `totals` may be memory of the host.
extern "C" __global__ void __launch_bounds__(MPD_THREADS)
    mpd_total(const __grid_constant__ MpdScaleArguments args) {
  if (first_bucket_of_thread() >= 32) return;
  double totals[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) totals[i] = total_of<3>(args.partial + i, args.warps);
  if (lane() != 0) return;
#pragma unroll
  for (int i = 0; i < 3; ++i) args.totals[i] = totals[i];
}
