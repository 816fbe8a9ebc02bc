// Life of an MpdNodeRank, and what is neither publication nor inbox.
#include "node_rank.h"

MpdNodeRank::MpdNodeRank(const MpdNodeSetup& setup)
    : setup_(setup),
      words_(setup.words, setup.words + setup.size),
      slots_(setup.slots, setup.slots + setup.size),
      last_words_(setup.publication_slots, slot_word(kFree)),
      sent_(setup.size),
      received_(setup.size),
      interrupted_(setup.size) {
  for (int64_t slot = 0; slot < setup.publication_slots; ++slot) free_.push_back(slot);
  arrivals_.reserve(setup.inbox_slots);
}

extern "C" {

MpdNodeRank* mpd_node_create(const MpdNodeSetup* setup) { return new MpdNodeRank(*setup); }

void mpd_node_destroy(MpdNodeRank* node) { delete node; }
}
