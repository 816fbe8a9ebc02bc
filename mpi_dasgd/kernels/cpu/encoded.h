// How the objects of the instruction sets see a message: each has its own copy, compiled for its set.
#ifndef MPD_CPU_CODES_H
#define MPD_CPU_CODES_H
#include <type_traits>

#include "../lattice_math.h"
#include "fused_step.h"

namespace {

constexpr int kBucket = MPD_BUCKET;

template <int BITS>
using Code = std::conditional_t<BITS == 16, uint16_t, uint8_t>;
template <int BITS>
constexpr int kCodes = BITS == 4 ? kBucket / 2 : kBucket;  // items a bucket

template <int BITS>
Code<BITS>* codes_of(const MpdMessage& message, int64_t bucket) {
  return static_cast<Code<BITS>*>(message.codes) + bucket * kCodes<BITS>;
}

inline uint32_t key_of(const MpdMessage& message, int64_t bucket) {
  return mpd_key(message.seed, static_cast<uint64_t>(bucket));
}

}  // namespace

#endif
