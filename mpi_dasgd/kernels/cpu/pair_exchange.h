// The pair exchange of algorithms/pair_averaging.py between ranks of a node, in one call a step.
#ifndef MPD_CPU_PAIR_EXCHANGE_H
#define MPD_CPU_PAIR_EXCHANGE_H
#include <cstdint>

#include "../optimizer_math.h"
#include "node_rank.h"
#include "pair_codec.h"
#include "record_ring.h"

struct MpdPairExchangeSetup {
  MpdNodeRank* node;
  MpdRecordRing* records;  // gets the rows of the exchanges
  MpdPairCodec codec;
  double weight;  // share of the distance to the partner to move
};

// What did not go as usual, instead of a count, which is 0 or more.
enum MpdPairFailure : int64_t {
  kDiverged = -1,     // the model behind the optimizer's step: nothing was given away
  kNoRoom = -2,       // in the ring of records: nothing was done
  kBadMessage = -3,   // the header of the message in slot `bad_slot` of rank `bad_rank`
  kForeignSwap = -4,  // another rank has changed words that only their owner changes
};

// Which message was bad.
struct MpdPairResult {
  int64_t bad_rank, bad_slot;
};

#endif
