// One rank's side of the protocols of transport/publication.py and transport/inbox.py, between
// ranks that share memory: words change by the processor's atomics, payload slots are in place.
//
// The order of word operations and fences is that of the Python classes, operation by operation
// [tests/transport/test_native_protocol.py]. Nothing waits on a device here: what those classes do
// for swaps that are made later is left out. One thread uses an object at a time.
#ifndef MPD_CPU_NODE_RANK_H
#define MPD_CPU_NODE_RANK_H
#include <cstdint>
#include <vector>

// Counters of transport/counters.py, which Python reads and changes, too.
struct MpdTransportCounters {
  int64_t messages, bytes_sent, bytes_received, absorbed, publications, publications_skipped,
      claims_lost, inbox_full, torn_reads, skipped;
};

// For tests: words are reached by these functions instead, and fences are seen.
typedef int64_t (*MpdReadHook)(int64_t rank, int64_t index);
typedef int64_t (*MpdSwapHook)(int64_t rank, int64_t index, int64_t expected, int64_t desired);
typedef void (*MpdFenceHook)();

struct MpdNodeSetup {
  int64_t rank, size;
  int64_t publication_slots, inbox_slots, max_claims;
  int64_t first_slot_word, head_word;  // indices of a rank's words
  int64_t nbytes;                      // of a message
  int64_t* const* words;               // of each rank; read by mpd_node_create only
  uint8_t* const* slots;               // likewise
  MpdTransportCounters* counters;
  MpdReadHook read;  // null: the processor's atomics; so are the two that follow
  MpdSwapHook swap;
  MpdFenceHook fence;
};

// A message in the own inbox, readable until it is freed.
struct MpdArrival {
  int64_t sender, slot;
};

// A version of another rank's publication that this one has claimed.
struct MpdClaim {
  int64_t rank, slot, version;
};

enum MpdSlotState : int64_t { kFree, kReady, kClaimed };

constexpr int64_t slot_word(MpdSlotState state, int64_t holder = 0, int64_t version = 0) {
  return version << 22 | holder << 2 | state;
}
constexpr int64_t holder_of(int64_t word) { return word >> 2 & ((1 << 20) - 1); }
constexpr int64_t version_of(int64_t word) { return word >> 22; }
constexpr bool is_in_state(int64_t word, MpdSlotState state) { return (word & 3) == state; }

class MpdNodeRank {
 public:
  explicit MpdNodeRank(const MpdNodeSetup& setup);

  // Words and slots.
  int64_t read(int64_t rank, int64_t index) const {
    if (setup_.read != nullptr) return setup_.read(rank, index);
    return __atomic_load_n(words_[rank] + index, __ATOMIC_SEQ_CST);
  }
  bool swap(int64_t rank, int64_t index, int64_t expected, int64_t desired) const {
    if (setup_.swap != nullptr) return setup_.swap(rank, index, expected, desired) != 0;
    return __atomic_compare_exchange_n(words_[rank] + index, &expected, desired, false,
                                       __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  }
  void fence() const {
    if (setup_.fence != nullptr) setup_.fence();
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
  }
  uint8_t* publication_slot(int64_t rank, int64_t slot) const {
    return slots_[rank] + slot * setup_.nbytes;
  }
  uint8_t* inbox_slot(int64_t rank, int64_t slot) const {
    return slots_[rank] + (setup_.publication_slots + slot) * setup_.nbytes;
  }
  int64_t rank() const { return setup_.rank; }
  int64_t publication_slots() const { return setup_.publication_slots; }
  int64_t inbox_slots() const { return setup_.inbox_slots; }
  int64_t nbytes() const { return setup_.nbytes; }
  MpdTransportCounters& counters() { return *setup_.counters; }

  // The publication: publication.cpp.
  int64_t reserve_publication();  // a slot, -1 if none is free
  bool publish();                 // of the slot reserved last; false: others have changed its words
  bool claim(int64_t rank, MpdClaim* claim);
  void release(const MpdClaim& claim) const;
  int64_t claims();
  bool has_free_slot();
  void reclaim_publication_from(int64_t rank);
  int64_t reserved() const { return reserved_; }
  int64_t newest() const { return newest_ < 0 ? 0 : version_ << 8 | newest_; }

  // The inbox: inbox.cpp.
  int64_t reserve(int64_t rank);  // a slot of that rank's inbox, -1 if it is full
  void send(int64_t rank, int64_t slot);
  void cancel(int64_t rank, int64_t slot) const;
  const std::vector<MpdArrival>& receive();
  const std::vector<MpdArrival>& arrivals() const { return arrivals_; }
  bool has_messages() const;
  bool free(const MpdArrival& arrival) const;  // false: others have changed its word
  void reclaim_inbox_from(int64_t rank);
  int64_t sent(int64_t rank) const { return sent_[rank]; }

 private:
  struct Replaced {  // a slot of an earlier version that is not known to be free
    int64_t slot, version;
  };
  struct Message {
    int64_t sender, sequence, slot;
  };

  int64_t publication_word(int64_t slot) const { return setup_.first_slot_word + slot; }
  int64_t inbox_word(int64_t slot) const {
    return setup_.first_slot_word + setup_.publication_slots + slot;
  }
  void retire(int64_t slot, int64_t version);
  int64_t collect();
  void find_ready(std::vector<Message>* ready) const;
  void skip_lost();

  MpdNodeSetup setup_;
  std::vector<int64_t*> words_;
  std::vector<uint8_t*> slots_;

  std::vector<int64_t> free_;
  std::vector<int64_t> last_words_;  // of the slots that are free
  std::vector<Replaced> replaced_;
  int64_t newest_ = -1, reserved_ = -1, version_ = 0;

  std::vector<int64_t> sent_, received_;  // number of messages to and from each rank
  std::vector<char> interrupted_;         // senders that may leave out numbers from now on
  bool any_interrupted_ = false;
  std::vector<Message> ready_, seen_;
  std::vector<MpdArrival> arrivals_;
};

#endif
