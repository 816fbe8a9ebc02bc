#include "release.h"

#include "control_words.h"

// A host function of a CUDA stream (cuLaunchHostFunc): a thread of the driver runs it when the
// stream has come so far. No call of CUDA, no lock, no Python.
extern "C" void mpd_release(void* data) {
  auto* release = static_cast<MpdRelease*>(data);
  for (int64_t i = 0; i < release->count; ++i) {
    const MpdSwap& swap = release->swaps[i];
    const bool swapped =
        mpd_word_swap(reinterpret_cast<int64_t*>(swap.word), swap.expected, swap.desired);
    if (!swapped && swap.required && !release->failed) release->failed = i + 1;
  }
  __atomic_store_n(&release->done, 1, __ATOMIC_SEQ_CST);
}
