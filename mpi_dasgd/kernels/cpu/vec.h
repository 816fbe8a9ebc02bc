// One register of the instruction set that a file is compiled for, with the operators of C++, and
// what the lattice codec does with codes of 8 bits in it.
#ifndef MPD_CPU_VEC_H
#define MPD_CPU_VEC_H
#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MPD_VEC512
#elif defined(__AVX2__)
#define MPD_VEC256
#elif defined(__SSE2__)
#define MPD_VEC128
#endif

namespace {

#if defined(MPD_VEC512)
constexpr int kWidth = 16;  // elements of 32 bits
#elif defined(MPD_VEC256)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kRegister = 4 * kWidth;  // bytes, and codes of 8 bits that fill it

typedef float Floats __attribute__((vector_size(kRegister)));
typedef uint32_t Words __attribute__((vector_size(kRegister)));
typedef int32_t Ints __attribute__((vector_size(kRegister)));
typedef uint8_t Bytes __attribute__((vector_size(kRegister)));

#define MPD_INLINE inline __attribute__((always_inline))

template <class Vector, class Item>
MPD_INLINE Vector load(const Item* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}
template <class Vector, class Item>
MPD_INLINE void store(Item* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}
// A store that goes past the caches; `to` is aligned to a register.
MPD_INLINE void stream(uint8_t* to, Bytes bytes) {
#if defined(MPD_VEC512)
  _mm512_stream_si512((__m512i*)to, (__m512i)bytes);
#elif defined(MPD_VEC256)
  _mm256_stream_si256((__m256i*)to, (__m256i)bytes);
#elif defined(MPD_VEC128)
  _mm_stream_si128((__m128i*)to, (__m128i)bytes);
#else
  store(to, bytes);
#endif
}
MPD_INLINE Floats all(float a) { return a - Floats{}; }
MPD_INLINE Words all(uint32_t a) { return a - Words{}; }

// kWidth codes of 8 bits as 32 bits each.
MPD_INLINE Words widen(const uint8_t* codes) {
#if defined(MPD_VEC512)
  return (Words)_mm512_cvtepu8_epi32(load<__m128i>(codes));
#elif defined(MPD_VEC256)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes));
#elif defined(MPD_VEC128)
  const __m128i zero = _mm_setzero_si128(), four = _mm_cvtsi32_si128(load<int32_t>(codes));
  return (Words)_mm_unpacklo_epi16(_mm_unpacklo_epi8(four, zero), zero);
#else
  Words wide;
  for (int i = 0; i < kWidth; ++i) wide[i] = codes[i];
  return wide;
#endif
}
MPD_INLINE Ints widen_signed(const uint8_t* codes) {
#if defined(MPD_VEC512)
  return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(codes));
#elif defined(MPD_VEC256)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes));
#elif defined(MPD_VEC128)
  const __m128i four = _mm_cvtsi32_si128(load<int32_t>(codes));
  const __m128i twice = _mm_unpacklo_epi8(four, four);  // each byte in the upper half, too
  return (Ints)_mm_unpacklo_epi16(twice, twice) >> 24;
#else
  Ints wide;
  for (int i = 0; i < kWidth; ++i) wide[i] = static_cast<int8_t>(codes[i]);
  return wide;
#endif
}

// Four registers of numbers below 256 -> their bytes, in order.
MPD_INLINE Bytes narrow(Words a, Words b, Words c, Words d) {
#if defined(MPD_VEC512)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packus_epi32((__m512i)a, (__m512i)b);
  const __m512i high = _mm512_packus_epi32((__m512i)c, (__m512i)d);
  return (Bytes)_mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
#elif defined(MPD_VEC256)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i low = _mm256_packus_epi32((__m256i)a, (__m256i)b);
  const __m256i high = _mm256_packus_epi32((__m256i)c, (__m256i)d);
  return (Bytes)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
#elif defined(MPD_VEC128)
  const __m128i low = _mm_packs_epi32((__m128i)a, (__m128i)b);
  const __m128i high = _mm_packs_epi32((__m128i)c, (__m128i)d);
  return (Bytes)_mm_packus_epi16(low, high);
#else
  Bytes bytes;
  for (int i = 0; i < kWidth; ++i) {
    bytes[i] = static_cast<uint8_t>(a[i]);
    bytes[kWidth + i] = static_cast<uint8_t>(b[i]);
    bytes[2 * kWidth + i] = static_cast<uint8_t>(c[i]);
    bytes[3 * kWidth + i] = static_cast<uint8_t>(d[i]);
  }
  return bytes;
#endif
}

// |d| of signed bytes.
MPD_INLINE Bytes magnitude(Bytes d) {
#if defined(MPD_VEC512)
  return (Bytes)_mm512_abs_epi8((__m512i)d);
#elif defined(MPD_VEC256)
  return (Bytes)_mm256_abs_epi8((__m256i)d);
#else
  const Bytes negative = (Bytes)((d & 128) != 0);
  return (d ^ negative) - negative;
#endif
}

MPD_INLINE Bytes larger(Bytes a, Bytes b) {
#if defined(MPD_VEC512)
  return (Bytes)_mm512_max_epu8((__m512i)a, (__m512i)b);
#elif defined(MPD_VEC256)
  return (Bytes)_mm256_max_epu8((__m256i)a, (__m256i)b);
#elif defined(MPD_VEC128)
  return (Bytes)_mm_max_epu8((__m128i)a, (__m128i)b);
#else
  return a > b ? a : b;
#endif
}

// Adds the squares of bytes to sums of 32 bits, in some order.
MPD_INLINE Words add_squares(Words sum, Bytes a) {
#if defined(MPD_VEC512)
  const __m512i zero = _mm512_setzero_si512();
  const __m512i low = _mm512_unpacklo_epi8((__m512i)a, zero);
  const __m512i high = _mm512_unpackhi_epi8((__m512i)a, zero);
  return sum + (Words)_mm512_madd_epi16(low, low) + (Words)_mm512_madd_epi16(high, high);
#elif defined(MPD_VEC256)
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi8((__m256i)a, zero);
  const __m256i high = _mm256_unpackhi_epi8((__m256i)a, zero);
  return sum + (Words)_mm256_madd_epi16(low, low) + (Words)_mm256_madd_epi16(high, high);
#elif defined(MPD_VEC128)
  const __m128i zero = _mm_setzero_si128();
  const __m128i low = _mm_unpacklo_epi8((__m128i)a, zero);
  const __m128i high = _mm_unpackhi_epi8((__m128i)a, zero);
  return sum + (Words)_mm_madd_epi16(low, low) + (Words)_mm_madd_epi16(high, high);
#else
  for (int i = 0; i < kRegister; ++i) sum[i % kWidth] += static_cast<uint32_t>(a[i]) * a[i];
  return sum;
#endif
}

MPD_INLINE uint32_t total(Words a) {
  uint32_t sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += a[i];
  return sum;
}
MPD_INLINE uint32_t any(Words a) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= a[i];
  return bits;
}
MPD_INLINE uint32_t largest(Bytes a) {
  uint32_t most = 0;
  for (int i = 0; i < kRegister; ++i) most = a[i] > most ? a[i] : most;
  return most;
}

}  // namespace

#endif
