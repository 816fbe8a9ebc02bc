// The inbox of a rank of a node: transport/inbox.py says what each word means.
#include <algorithm>

#include "message_header.h"
#include "node_rank.h"

int64_t MpdNodeRank::reserve(int64_t rank) {
  const int64_t count = setup_.inbox_slots;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = (setup_.rank + sent_[rank] + i) % count;
    if (swap(rank, inbox_word(slot), slot_word(kFree), slot_word(kClaimed, setup_.rank)))
      return slot;
  }
  ++setup_.counters->inbox_full;
  return -1;
}

void MpdNodeRank::send(int64_t rank, int64_t slot) {
  header_of(inbox_slot(rank, slot))->sequence = sent_[rank];
  fence();  // the payload must be complete before the word says so
  if (swap(rank, inbox_word(slot), slot_word(kClaimed, setup_.rank),
           slot_word(kReady, setup_.rank))) {
    ++sent_[rank];
    ++setup_.counters->messages;
    setup_.counters->bytes_sent += setup_.nbytes;
  }  // else the receiver took this rank for dead and reclaimed the slot
}

void MpdNodeRank::cancel(int64_t rank, int64_t slot) const {
  swap(rank, inbox_word(slot), slot_word(kClaimed, setup_.rank), slot_word(kFree));
}

const std::vector<MpdArrival>& MpdNodeRank::receive() {
  find_ready(&ready_);
  if (any_interrupted_) skip_lost();
  std::sort(ready_.begin(), ready_.end(), [](const Message& a, const Message& b) {
    return a.sender != b.sender ? a.sender < b.sender : a.sequence < b.sequence;
  });
  arrivals_.clear();
  // The scan may see a message and have missed an earlier one: the next call returns both.
  for (const Message& message : ready_)
    if (message.sequence == received_[message.sender]) {
      ++received_[message.sender];
      arrivals_.push_back({message.sender, message.slot});
    }
  setup_.counters->absorbed += static_cast<int64_t>(arrivals_.size());
  return arrivals_;
}

// What is in the slots that are READY.
void MpdNodeRank::find_ready(std::vector<Message>* ready) const {
  ready->clear();
  for (int64_t slot = 0; slot < setup_.inbox_slots; ++slot) {
    const int64_t word = read(setup_.rank, inbox_word(slot));
    if (!is_in_state(word, kReady)) continue;
    fence();
    const Message found = {holder_of(word), header_of(inbox_slot(setup_.rank, slot))->sequence,
                           slot};
    const auto same = std::find_if(ready->begin(), ready->end(), [&](const Message& other) {
      return other.sender == found.sender && other.sequence == found.sequence;
    });
    if (same == ready->end())
      ready->push_back(found);
    else
      same->slot = slot;
  }
}

// Scans again, and does not wait for numbers that senders taken for dead have left out.
void MpdNodeRank::skip_lost() {
  seen_.swap(ready_);
  find_ready(&ready_);
  for (int64_t sender = 0; sender < setup_.size; ++sender) {
    if (!interrupted_[sender]) continue;
    int64_t first = -1;
    bool seen_before = false;
    for (const Message& message : ready_) {
      if (message.sender != sender || message.sequence < received_[sender]) continue;
      if (first < 0 || message.sequence < first) first = message.sequence;
      for (const Message& old : seen_)
        seen_before |= old.sender == sender && old.sequence == message.sequence;
    }
    if (seen_before) received_[sender] = first;
  }
}

bool MpdNodeRank::has_messages() const {
  for (int64_t slot = 0; slot < setup_.inbox_slots; ++slot)
    if (is_in_state(read(setup_.rank, inbox_word(slot)), kReady)) return true;
  return false;
}

bool MpdNodeRank::free(const MpdArrival& arrival) const {
  return swap(setup_.rank, inbox_word(arrival.slot), slot_word(kReady, arrival.sender),
              slot_word(kFree));
}

void MpdNodeRank::reclaim_inbox_from(int64_t rank) {
  for (int64_t slot = 0; slot < setup_.inbox_slots; ++slot)
    if (swap(setup_.rank, inbox_word(slot), slot_word(kClaimed, rank), slot_word(kFree)))
      interrupted_[rank] = any_interrupted_ = true;
}

extern "C" {

int64_t mpd_inbox_reserve(MpdNodeRank* node, int64_t rank) { return node->reserve(rank); }

void mpd_inbox_send(MpdNodeRank* node, int64_t rank, int64_t slot) { node->send(rank, slot); }

void mpd_inbox_cancel(MpdNodeRank* node, int64_t rank, int64_t slot) { node->cancel(rank, slot); }

// Returns how many messages have arrived, and writes them to `arrivals`.
int64_t mpd_inbox_receive(MpdNodeRank* node, MpdArrival* arrivals) {
  const std::vector<MpdArrival>& received = node->receive();
  std::copy(received.begin(), received.end(), arrivals);
  return static_cast<int64_t>(received.size());
}

int64_t mpd_inbox_has_messages(MpdNodeRank* node) { return node->has_messages(); }

int64_t mpd_inbox_free(MpdNodeRank* node, int64_t sender, int64_t slot) {
  return node->free({sender, slot});
}

void mpd_inbox_reclaim_from(MpdNodeRank* node, int64_t rank) { node->reclaim_inbox_from(rank); }

// Number of messages sent to a rank so far.
int64_t mpd_inbox_sent(MpdNodeRank* node, int64_t rank) { return node->sent(rank); }
}
