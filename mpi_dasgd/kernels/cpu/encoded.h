// Access to the buckets of encoded vectors. Each object compiled for an instruction set has its own
// copy.
#ifndef MPD_CPU_ENCODED_H
#define MPD_CPU_ENCODED_H
#include <type_traits>

#include "../lattice_math.h"
#include "fused_step.h"

namespace {

constexpr int kBucket = MPD_BUCKET;

template <int BITS>
using Code = std::conditional_t<BITS == 16, uint16_t, uint8_t>;
template <int BITS>
constexpr int kCodes = BITS == 4 ? kBucket / 2 : kBucket;  // items per bucket, as stored

template <int BITS>
Code<BITS>* codes_of(const MpdEncodedVector& vector, int64_t bucket) {
  return static_cast<Code<BITS>*>(vector.codes) + bucket * kCodes<BITS>;
}

inline uint32_t key_of(const MpdEncodedVector& vector, int64_t bucket) {
  return mpd_key(vector.seed, static_cast<uint64_t>(bucket));
}

// Returns the codes of a bucket with one code per item: `stored` itself, or for 4 bits `scratch`,
// which receives them (the layout is drawn in layout.h).
template <int BITS>
const Code<BITS>* unpack(const Code<BITS>* __restrict stored, Code<BITS>* __restrict scratch) {
  if (BITS != 4) return stored;
  for (int g = 0; g < 4; ++g)
    for (int i = 0; i < 128; ++i) {
      scratch[g * 256 + i] = stored[g * 128 + i] & 15;
      scratch[g * 256 + 128 + i] = stored[g * 128 + i] >> 4;
    }
  return scratch;
}

// Stores 4-bit codes that have one item each; wider codes have been written in place.
template <int BITS>
void pack(const Code<BITS>* codes, Code<BITS>* stored) {
  if (BITS != 4) return;
  for (int g = 0; g < 4; ++g)
    for (int i = 0; i < 128; ++i)
      stored[g * 128 + i] = (codes[g * 256 + i] & 15) | codes[g * 256 + 128 + i] << 4;
}

// One bucket of a publication to be decoded.
template <int BITS>
struct BucketView {
  const Code<BITS>* codes;  // one per item
  float scale;
  uint32_t key, checksum;
};

// `scratch` holds the codes if they have to be unpacked.
template <int BITS>
BucketView<BITS> view_of(const MpdEncodedVector& vector, int64_t bucket, Code<BITS>* scratch) {
  return {unpack<BITS>(codes_of<BITS>(vector, bucket), scratch), vector.scales[bucket],
          key_of(vector, bucket), vector.checksums[bucket]};
}

// mpd_weight of all positions.
struct PositionWeights {
  uint32_t at[kBucket] = {};
  constexpr PositionWeights() {
    for (uint32_t j = 0; j < kBucket; ++j) at[j] = mpd_weight(j);
  }
};
alignas(64) constexpr PositionWeights kWeights{};

}  // namespace

#endif
