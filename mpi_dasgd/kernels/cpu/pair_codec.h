// State of a rank's codec that Python and the native exchange change in turn: the mirrors are in
// codecs/native_state.py.
#ifndef MPD_CPU_PAIR_CODEC_H
#define MPD_CPU_PAIR_CODEC_H
#include <cstdint>

#include "../layout.h"

// Seeds of codecs/base.py.
struct MpdSeeds {
  uint64_t start;
  int64_t drawn;
};

// AdaptiveScale of codecs/bucket_scale.py.
struct MpdAdaptiveScale {
  float *estimate, *floor, *last;  // per bucket
  int64_t buckets;
  int64_t encodings, refresh_encodings;
  float scale_per_distance, decay, max_estimate;
  int32_t doubles_estimate;
};

// Counters of a lattice codec.
struct MpdBucketCounts {
  int64_t decoded, rejected, corrupt;
};

struct MpdPairCodec {
  int64_t bits;  // 4, 8 or 16 of a lattice codec; 0: float32 elements as they are
  int64_t nearest, threads, elements;
  MpdSeeds* seeds;  // null with `none`, and so are the two that follow
  MpdAdaptiveScale* scale;
  MpdBucketCounts* counts;
  int64_t magic, version, codec, nbytes;        // of the header of each message
  int64_t scales_at, checksums_at, payload_at;  // offsets in a message
};

// AdaptiveScale::measures_next.
inline bool mpd_measures_next(const MpdAdaptiveScale& scale) {
  return scale.encodings % scale.refresh_encodings == 0;
}

// AdaptiveScale::scales: of an encoding of `x`, to `out`.
void mpd_next_scales(MpdAdaptiveScale* scale, const float* x, int64_t elements, float* out);

// LatticeCodec._observe_delta: after a delta with these units was absorbed.
void mpd_observe_delta(const MpdPairCodec& codec, const MpdBucketStats* stats, const float* units,
                       double weight);

struct MpdObserved {
  double distance;
  int64_t rejected;
};

// LatticeCodec._observe: after an exchange with a publication of these scales.
MpdObserved mpd_observe_publication(const MpdPairCodec& codec, const MpdBucketStats* stats,
                                    const float* scales);

#endif
