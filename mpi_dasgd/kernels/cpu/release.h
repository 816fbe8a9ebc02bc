// Control-word swaps that give memory away, made when a device has passed the work on it.
#ifndef MPD_CPU_RELEASE_H
#define MPD_CPU_RELEASE_H
#include <cstdint>

#define MPD_MAX_SWAPS 80

// Sets *word to `desired` if it is `expected`.
struct MpdSwap {
  int64_t word;  // its address
  int64_t expected;
  int64_t desired;
  int64_t required;  // whether it is an error if the word is another one
};

// Swaps to be made in order.
struct MpdRelease {
  int64_t count;
  int64_t failed;  // 1 + number of the first required swap that found another word; 0 if none did
  int64_t done;    // set last
  MpdSwap swaps[MPD_MAX_SWAPS];
};

#endif
