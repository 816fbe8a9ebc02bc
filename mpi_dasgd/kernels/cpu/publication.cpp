// The publication of a rank of a node: transport/publication.py says what each word means.
#include <algorithm>

#include "node_rank.h"

int64_t MpdNodeRank::reserve_publication() {
  if (!has_free_slot()) {
    ++setup_.counters->publications_skipped;
    return -1;
  }
  // Who reads without a claim sees that the head has moved on if it sees what is written now.
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  return reserved_ = free_.back();
}

bool MpdNodeRank::publish() {
  const int64_t slot = reserved_, owner = setup_.rank;
  reserved_ = -1;
  free_.erase(std::find(free_.begin(), free_.end(), slot));
  fence();  // the payload must be complete before the word says so
  ++version_;
  const bool published =
      swap(owner, publication_word(slot), last_words_[slot], slot_word(kReady, owner, version_));
  const int64_t old = newest_ < 0 ? 0 : (version_ - 1) << 8 | newest_;
  const bool became_head = swap(owner, setup_.head_word, old, version_ << 8 | slot);
  if (!published || !became_head) return false;
  if (newest_ >= 0) retire(newest_, version_ - 1);
  newest_ = slot;
  ++setup_.counters->publications;
  return true;
}

void MpdNodeRank::retire(int64_t slot, int64_t version) {
  const int64_t ready = slot_word(kReady, setup_.rank, version);
  const int64_t free = slot_word(kFree, 0, version);
  if (swap(setup_.rank, publication_word(slot), ready, free)) {
    free_.push_back(slot);
    last_words_[slot] = free;
  } else {
    replaced_.push_back({slot, version});
  }
}

bool MpdNodeRank::claim(int64_t rank, MpdClaim* claim) {
  const int64_t head = read(rank, setup_.head_word);
  const int64_t version = head >> 8, slot = head & 0xff;
  if (version == 0) return false;
  if (!swap(rank, publication_word(slot), slot_word(kReady, rank, version),
            slot_word(kClaimed, setup_.rank, version))) {
    ++setup_.counters->claims_lost;
    return false;
  }
  *claim = {rank, slot, version};
  return true;
}

void MpdNodeRank::release(const MpdClaim& claim) const {
  swap(claim.rank, publication_word(claim.slot), slot_word(kClaimed, setup_.rank, claim.version),
       slot_word(kFree, 0, claim.version));
}

int64_t MpdNodeRank::claims() {
  const int64_t claimed = collect();
  if (newest_ < 0) return claimed;
  return claimed + is_in_state(read(setup_.rank, publication_word(newest_)), kClaimed);
}

bool MpdNodeRank::has_free_slot() { return claims() < setup_.max_claims && !free_.empty(); }

// Takes back replaced slots that are free by now; returns how many are still claimed.
int64_t MpdNodeRank::collect() {
  int64_t claimed = 0;
  auto kept = replaced_.begin();
  for (const Replaced old : replaced_) {
    const int64_t word = read(setup_.rank, publication_word(old.slot));
    if (is_in_state(word, kFree) && version_of(word) == old.version) {
      free_.push_back(old.slot);
      last_words_[old.slot] = word;
    } else {
      claimed += is_in_state(word, kClaimed);
      *kept++ = old;
    }
  }
  replaced_.erase(kept, replaced_.end());
  return claimed;
}

void MpdNodeRank::reclaim_publication_from(int64_t rank) {
  const auto reclaim = [&](int64_t slot) {
    const int64_t index = publication_word(slot), word = read(setup_.rank, index);
    if (is_in_state(word, kClaimed) && holder_of(word) == rank)
      swap(setup_.rank, index, word, slot_word(kFree, 0, version_of(word)));
  };
  for (const Replaced& old : replaced_) reclaim(old.slot);
  if (newest_ >= 0) reclaim(newest_);
}

extern "C" {

int64_t mpd_publication_reserve(MpdNodeRank* node) { return node->reserve_publication(); }

// -1: no slot is reserved; 0: others have changed the owner's words.
int64_t mpd_publication_publish(MpdNodeRank* node) {
  return node->reserved() < 0 ? -1 : node->publish();
}

// Returns the head word that was claimed, version << 8 | slot; 0 if none was.
int64_t mpd_publication_claim(MpdNodeRank* node, int64_t rank) {
  MpdClaim claim;
  return node->claim(rank, &claim) ? claim.version << 8 | claim.slot : 0;
}

void mpd_publication_release(MpdNodeRank* node, int64_t rank, int64_t slot, int64_t version) {
  node->release({rank, slot, version});
}

int64_t mpd_publication_claims(MpdNodeRank* node) { return node->claims(); }

int64_t mpd_publication_has_free_slot(MpdNodeRank* node) { return node->has_free_slot(); }

void mpd_publication_reclaim_from(MpdNodeRank* node, int64_t rank) {
  node->reclaim_publication_from(rank);
}

// Returns the head word of the newest version, 0 if there is none.
int64_t mpd_publication_newest(MpdNodeRank* node) { return node->newest(); }
}
