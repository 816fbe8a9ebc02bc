// The words that a rank writes and reads in each of its steps, where ranks share memory.
#ifndef MPD_CPU_STEP_WORDS_H
#define MPD_CPU_STEP_WORDS_H
#include <cstdint>

// transport/rma/step_words.py makes it and mirrors it.
struct MpdStepWords {
  int64_t rank, size;
  int64_t gradients_word, samples_word, status_word;  // indices of a rank's words
  int64_t* const* words;                              // of each rank, its first word
  const uint8_t* counted;                             // of each rank, whether it is read in a step
  int64_t* gradients;  // of each rank, as last seen here; Python reads and changes them, too
  int64_t* samples;    // likewise
  int64_t* status;     // likewise: the whole word, as mpd_read_peers has found it
  int64_t* news;       // [1]: whether mpd_end_step has seen another status
};

#endif
