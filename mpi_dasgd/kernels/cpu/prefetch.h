// What the next bucket will read, asked for a few cache lines at a time while this one is computed:
// the hardware does not look ahead beyond a page, and a bucket of the model is one page. In a burst
// the requests would wait for each other.
#ifndef MPD_CPU_PREFETCH_H
#define MPD_CPU_PREFETCH_H

namespace {

// The share of one stage of a bucket.
struct Prefetch {
  static constexpr int kMost = 6;
  const char* floats[kMost];  // vectors of float32, at the next bucket
  const char* codes[2];       // codes, likewise
  int float_count = 0, code_count = 0;

  void add_floats(const float* next) {
    if (next != nullptr && float_count < kMost)
      floats[float_count++] = reinterpret_cast<const char*>(next);
  }
  void add_codes(const void* next) {
    if (next != nullptr && code_count < 2) codes[code_count++] = static_cast<const char*>(next);
  }

  // Asks for elements first .. first + COUNT - 1 of the next bucket.
  template <int BITS, int COUNT>
  inline __attribute__((always_inline)) void ask(int first) const {
    for (int i = 0; i < float_count; ++i)
      for (int line = 0; line < COUNT * 4; line += 64)
        __builtin_prefetch(floats[i] + first * 4 + line, 0, 3);
    constexpr int kBytes = COUNT * BITS / 8;
    if (kBytes >= 64 || first * BITS / 8 % 64 == 0)
      for (int i = 0; i < code_count; ++i)
        for (int line = 0; line < kBytes; line += 64)
          __builtin_prefetch(codes[i] + first * BITS / 8 + line, 0, 3);
  }
};

}  // namespace

#endif
