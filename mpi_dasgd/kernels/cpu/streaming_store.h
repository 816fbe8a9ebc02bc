// Stores to memory that this core will not read soon: they bypass the caches and do not read the
// lines that they overwrite.
#ifndef MPD_CPU_STREAMING_STORE_H
#define MPD_CPU_STREAMING_STORE_H
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kStreamBytes = 1 << 18;  // vectors above this size are streamed
constexpr int64_t kStreamCodes = 1 << 22;  // codes above this number of bytes are streamed

inline void stream(void* out, const void* in, size_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0 && bytes % 16 == 0) {
    auto* to = static_cast<__m128i*>(out);
    const auto* from = static_cast<const __m128i*>(in);
    for (size_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
    return;
  }
#endif
  std::memcpy(out, in, bytes);
}

// Streamed stores must be visible before a control word announces them.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

#endif
