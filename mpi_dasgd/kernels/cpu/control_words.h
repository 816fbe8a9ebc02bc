// Control words in memory shared by the processes of a node: sequentially consistent, lock-free.
#ifndef MPD_CPU_CONTROL_WORDS_H
#define MPD_CPU_CONTROL_WORDS_H
#include <cstdint>

extern "C" {

int64_t mpd_word_read(const int64_t* word);

// Compare-and-swap: sets the word to `desired` if it is `expected`; returns whether it was.
int mpd_word_swap(int64_t* word, int64_t expected, int64_t desired);
}

#endif
