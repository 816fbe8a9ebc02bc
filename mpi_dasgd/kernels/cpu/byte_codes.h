// The loops of the lattice codec for codes of 4 and 8 bits, a register at a time: what is known of
// codes is computed on bytes, four times as many in a register. A code is a byte here; the byte of a
// difference of 4 bits has its sign.
#ifndef MPD_CPU_BYTE_CODES_H
#define MPD_CPU_BYTE_CODES_H
#include <cstring>

#include "encoded.h"
#include "prefetch.h"
#include "streaming_store.h"
#include "vec.h"

namespace {

constexpr int kRound = 4 * kWidth;  // elements of a round: their codes fill a register

// What is known of the differences of a bucket.
struct ByteTally {
  Bytes most{};
  Words squares{}, words{};

  // Adds a register of differences, number first .. of the bucket.
  MPD_INLINE void add(Bytes d, int first) {
    const Bytes size = magnitude(d);
    most = larger(most, size);
    squares = add_squares(squares, size);
    words += (Words)d * load<Words>(kWeights.at + first / 4);
  }
  MPD_INLINE MpdBucketStats stats() const {
    const uint32_t size = largest(most);
    return {0, size * size, total(squares)};
  }
  // Weighted sum of the 32-bit words of the bytes: with 8 bits that for the checksum of a delta.
  MPD_INLINE uint32_t sum_of_words() const { return total(words); }
};

// mpd_round of the elements of a bucket, and what tells that one is out of range.
template <bool NEAREST>
struct Points {
  Floats inverse;
  Words key, range_bits{};

  MPD_INLINE Points(float scale, uint32_t bucket_key)
      : inverse(all(mpd_inverse(scale))), key(all(bucket_key)) {}
  MPD_INLINE Words next(Floats x, Words weight) {
    Floats t = x * inverse;
    if (!NEAREST) t = t + ((Floats)(((weight + key) >> 9) | 0x3f800000u) - 1.5f);
    const Words z = (Words)(t + MPD_MAGIC);
    range_bits |= z ^ 0x4b000000u;
    return z;
  }
  MPD_INLINE bool in_range() const { return mpd_in_range(any(range_bits)); }
};

template <int BITS>
MPD_INLINE Words fold(Words z) {
  return z + (z >> BITS);
}

// Returns the codes of a bucket of a delta as bytes with a sign: `stored`, or for 4 bits `scratch`,
// which receives them.
template <int BITS>
const uint8_t* signed_bytes(const uint8_t* stored, uint8_t* scratch) {
  const uint8_t* codes = unpack<BITS>(stored, scratch);
  if (BITS == 4)
    for (int j = 0; j < kBucket; j += kRegister)
      store(scratch + j, (load<Bytes>(scratch + j) ^ 8) - 8);
  return codes;
}

inline ByteTally tally_of(const uint8_t* differences) {
  ByteTally tally;
  for (int j = 0; j < kBucket; j += kRegister) tally.add(load<Bytes>(differences + j), j);
  return tally;
}

// y + unit * d -> out, which may be y.
template <int BITS>
void move_bytes(const float* y, const uint8_t* differences, float unit, float* out,
                const Prefetch& prefetch) {
  for (int first = 0; first < kBucket; first += kRound) {
    prefetch.ask<BITS, kRound>(first);
    for (int j = first; j < first + kRound; j += kWidth)
      store(out + j, load<Floats>(y + j) +
                         unit * __builtin_convertvector(widen_signed(differences + j), Floats));
  }
}

// Codes of a publication against y -> their difference on the lattice; returns whether it is valid.
// `streamed` receives the differences, too, past the caches; null: nothing does.
template <int BITS, bool NEAREST>
bool difference_bytes(const float* y, const BucketView<BITS>& bucket, uint8_t* differences,
                      uint8_t* streamed, ByteTally& result, const Prefetch& prefetch) {
  constexpr uint32_t kMask = (1u << BITS) - 1, kHalf = 1u << (BITS - 1);
  Points<NEAREST> points(bucket.scale, bucket.key);
  Words sum{};
  ByteTally tally;
  for (int first = 0; first < kBucket; first += kRound) {
    prefetch.ask<BITS, kRound>(first);
    Words above[4];  // the difference + kHalf
    for (int k = 0; k < 4; ++k) {
      const int j = first + k * kWidth;
      const Words weight = load<Words>(kWeights.at + j);
      const Words below = points.next(load<Floats>(y + j), weight) - kHalf;
      above[k] = (widen(bucket.codes + j) - below) & kMask;
      sum += fold<BITS>(below + above[k]) * weight;
    }
    const Bytes d = narrow(above[0], above[1], above[2], above[3]) - static_cast<uint8_t>(kHalf);
    tally.add(d, first);
    store(differences + first, d);
    if (streamed != nullptr) stream(streamed + first, d);
  }
  result = tally;
  return mpd_scale_ok(bucket.scale) && points.in_range() &&
         mpd_checksum(total(sum), bucket.scale, bucket.key) == bucket.checksum;
}

// With MOVE first y + unit * d -> x, otherwise x is y. x -> codes, if wanted past the caches; returns
// the checksum.
template <int BITS, bool NEAREST, bool MOVE>
uint32_t encode_bytes(const float* y, const uint8_t* differences, float unit, float* x, float scale,
                      uint32_t key, uint8_t* codes, bool streaming, const Prefetch& prefetch) {
  constexpr uint32_t kMask = (1u << BITS) - 1;
  Points<NEAREST> points(scale, key);
  Words sum{};
  for (int first = 0; first < kBucket; first += kRound) {
    prefetch.ask<BITS, kRound>(first);
    Words low[4];
    for (int k = 0; k < 4; ++k) {
      const int j = first + k * kWidth;
      const Words weight = load<Words>(kWeights.at + j);
      Floats v = load<Floats>(y + j);
      if (MOVE) {
        v = v + unit * __builtin_convertvector(widen_signed(differences + j), Floats);
        store(x + j, v);
      }
      const Words z = points.next(v, weight);
      sum += fold<BITS>(z) * weight;
      low[k] = z & kMask;
    }
    const Bytes bytes = narrow(low[0], low[1], low[2], low[3]);
    if (streaming)
      stream(codes + first, bytes);
    else
      store(codes + first, bytes);
  }
  if (mpd_scale_ok(scale) && points.in_range()) return mpd_checksum(total(sum), scale, key);
  if (streaming) stream_fence();
  std::memset(codes, 0, kBucket);  // every reader must reject it
  return ~mpd_checksum(0, scale, key);
}

}  // namespace

#endif
