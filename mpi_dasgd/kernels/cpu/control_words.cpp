#include "control_words.h"

static_assert(__atomic_always_lock_free(sizeof(int64_t), nullptr),
              "words are shared between processes, which cannot share a lock of the library");

extern "C" {

int64_t mpd_word_read(const int64_t* word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

int mpd_word_swap(int64_t* word, int64_t expected, int64_t desired) {
  return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST);
}
}
