// A step's own reports, and what it reads of the others: transport/membership.py in one call each.
#include "step_words.h"

#include "control_words.h"

namespace {

// Sets a word that only this rank changes.
void report(const MpdStepWords* step, int64_t index, int64_t value) {
  int64_t* word = step->words[step->rank] + index;
  mpd_word_swap(word, mpd_word_read(word), value);
}

int64_t count_gradients(const MpdStepWords* step) {
  int64_t sum = 0;
  for (int64_t rank = 0; rank < step->size; ++rank) {
    if (step->counted[rank])
      step->gradients[rank] = mpd_word_read(step->words[rank] + step->gradients_word);
    sum += step->gradients[rank];
  }
  return sum;
}

}  // namespace

extern "C" {

// Reports how many gradients this rank has computed; returns those of all ranks.
int64_t mpd_begin_step(const MpdStepWords* step, int64_t gradients) {
  report(step, step->gradients_word, gradients);
  step->gradients[step->rank] = gradients;
  return count_gradients(step);
}

// Reports how many samples this rank has processed, and reads those of others; returns the
// gradients of all ranks.
int64_t mpd_end_step(const MpdStepWords* step, int64_t samples) {
  report(step, step->samples_word, samples);
  step->samples[step->rank] = samples;
  for (int64_t rank = 0; rank < step->size; ++rank) {
    if (!step->counted[rank]) continue;
    if (mpd_word_read(step->words[rank] + step->status_word) != step->status[rank]) *step->news = 1;
    step->samples[rank] = mpd_word_read(step->words[rank] + step->samples_word);
  }
  return count_gradients(step);
}

// Reads status and samples of the other ranks; returns whether the status of one has changed.
int mpd_read_peers(const MpdStepWords* step) {
  int is_changed = 0;
  *step->news = 0;
  for (int64_t rank = 0; rank < step->size; ++rank) {
    if (rank == step->rank) continue;
    // The status first: the samples are final then.
    const int64_t status = mpd_word_read(step->words[rank] + step->status_word);
    step->samples[rank] = mpd_word_read(step->words[rank] + step->samples_word);
    is_changed |= status != step->status[rank];
    step->status[rank] = status;
  }
  return is_changed;
}
}
