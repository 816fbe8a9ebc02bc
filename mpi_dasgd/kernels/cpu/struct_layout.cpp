// For tests: the layout of the structs of this library, see struct_layout.h.
#include "struct_layout.h"

#include "fused_step.h"
#include "node_rank.h"
#include "pair_exchange.h"
#include "record_ring.h"
#include "release.h"
#include "roofline.h"
#include "step_words.h"

namespace {

// What optimizer_math.h declares.
void describe_optimizer(StructLayout& layout) {
  MPD_STRUCT(layout, MpdOptimizerGroup);
  MPD_FIELD(layout, MpdOptimizerGroup, kind);
  MPD_FIELD(layout, MpdOptimizerGroup, flags);
  MPD_FIELD(layout, MpdOptimizerGroup, factor);
  MPD_FIELD(layout, MpdOptimizerGroup, decay);
  MPD_FIELD(layout, MpdOptimizerGroup, momentum);
  MPD_FIELD(layout, MpdOptimizerGroup, fresh);
  MPD_FIELD(layout, MpdOptimizerGroup, lerp);
  MPD_FIELD(layout, MpdOptimizerGroup, rate);
  MPD_FIELD(layout, MpdOptimizerGroup, root);
  MPD_FIELD(layout, MpdOptimizerGroup, eps);
  MPD_STRUCT(layout, MpdOptimizerSegment);
  MPD_FIELD(layout, MpdOptimizerSegment, offset);
  MPD_FIELD(layout, MpdOptimizerSegment, count);
  MPD_FIELD(layout, MpdOptimizerSegment, gradient);
  MPD_FIELD(layout, MpdOptimizerSegment, group);
  MPD_STRUCT(layout, MpdOptimizer);
  MPD_FIELD(layout, MpdOptimizer, segments);
  MPD_FIELD(layout, MpdOptimizer, segment_count);
  MPD_FIELD(layout, MpdOptimizer, groups);
  MPD_FIELD(layout, MpdOptimizer, first);
  MPD_FIELD(layout, MpdOptimizer, second);
  MPD_FIELD(layout, MpdOptimizer, third);
  MPD_FIELD(layout, MpdOptimizer, nonfinite);
  MPD_VALUE(layout, kSgd);
  MPD_VALUE(layout, kAdam);
  MPD_VALUE(layout, kNesterov);
  MPD_VALUE(layout, kDecay);
  MPD_VALUE(layout, kDecoupled);
  MPD_VALUE(layout, kMaximize);
  MPD_VALUE(layout, kMomentum);
  MPD_VALUE(layout, kFirst);
  MPD_VALUE(layout, kFactor);
  MPD_VALUE(layout, kAmsgrad);
  MPD_VALUE(layout, kTail);
  MPD_VALUE(layout, MPD_TORCH_VECTOR);
}

}  // namespace

extern "C" const char* mpd_struct_layout() {
  static const StructLayout all = [] {
    StructLayout layout;
    describe_layout(layout);
    MPD_STRUCT(layout, MpdFusedStep);
    MPD_FIELD(layout, MpdFusedStep, bits);
    MPD_FIELD(layout, MpdFusedStep, x);
    MPD_FIELD(layout, MpdFusedStep, elements);
    MPD_FIELD(layout, MpdFusedStep, optimizer);
    MPD_FIELD(layout, MpdFusedStep, deltas);
    MPD_FIELD(layout, MpdFusedStep, delta_stats);
    MPD_FIELD(layout, MpdFusedStep, delta_count);
    MPD_FIELD(layout, MpdFusedStep, partner_model);
    MPD_FIELD(layout, MpdFusedStep, weight);
    MPD_FIELD(layout, MpdFusedStep, merge);
    MPD_FIELD(layout, MpdFusedStep, stats);
    MPD_FIELD(layout, MpdFusedStep, reply_delta);
    MPD_FIELD(layout, MpdFusedStep, threads);
    MPD_FIELD(layout, MpdFusedStep, publication);
    describe_optimizer(layout);
    MPD_STRUCT(layout, MpdSwap);
    MPD_FIELD(layout, MpdSwap, word);
    MPD_FIELD(layout, MpdSwap, expected);
    MPD_FIELD(layout, MpdSwap, desired);
    MPD_FIELD(layout, MpdSwap, required);
    MPD_STRUCT(layout, MpdRelease);
    MPD_FIELD(layout, MpdRelease, count);
    MPD_FIELD(layout, MpdRelease, failed);
    MPD_FIELD(layout, MpdRelease, done);
    MPD_FIELD(layout, MpdRelease, swaps);
    MPD_VALUE(layout, MPD_MAX_SWAPS);
    MPD_STRUCT(layout, MpdExchangeRow);
    MPD_FIELD(layout, MpdExchangeRow, step);
    MPD_FIELD(layout, MpdExchangeRow, time_s);
    MPD_FIELD(layout, MpdExchangeRow, partner);
    MPD_FIELD(layout, MpdExchangeRow, kind);
    MPD_FIELD(layout, MpdExchangeRow, partner_step);
    MPD_FIELD(layout, MpdExchangeRow, age_steps);
    MPD_FIELD(layout, MpdExchangeRow, age_s);
    MPD_FIELD(layout, MpdExchangeRow, bytes);
    MPD_FIELD(layout, MpdExchangeRow, retries);
    MPD_FIELD(layout, MpdExchangeRow, distance);
    MPD_FIELD(layout, MpdExchangeRow, rejected);
    MPD_FIELD(layout, MpdExchangeRow, set_staleness);
    MPD_STRUCT(layout, MpdRecordRing);
    MPD_FIELD(layout, MpdRecordRing, rows);
    MPD_FIELD(layout, MpdRecordRing, capacity);
    MPD_FIELD(layout, MpdRecordRing, written);
    MPD_FIELD(layout, MpdRecordRing, taken);
    MPD_FIELD(layout, MpdRecordRing, origin_s);
    MPD_VALUE(layout, MPD_INITIATED);
    MPD_VALUE(layout, MPD_ABSORBED);
    MPD_VALUE(layout, MPD_SKIPPED);
    MPD_STRUCT(layout, MpdStepWords);
    MPD_FIELD(layout, MpdStepWords, rank);
    MPD_FIELD(layout, MpdStepWords, size);
    MPD_FIELD(layout, MpdStepWords, gradients_word);
    MPD_FIELD(layout, MpdStepWords, samples_word);
    MPD_FIELD(layout, MpdStepWords, status_word);
    MPD_FIELD(layout, MpdStepWords, words);
    MPD_FIELD(layout, MpdStepWords, counted);
    MPD_FIELD(layout, MpdStepWords, gradients);
    MPD_FIELD(layout, MpdStepWords, samples);
    MPD_FIELD(layout, MpdStepWords, status);
    MPD_FIELD(layout, MpdStepWords, news);
    MPD_VALUE(layout, kTrivial);
    MPD_VALUE(layout, kStreamed);
    MPD_VALUE(layout, kCopy);
    MPD_VALUE(layout, kTriad);
    MPD_VALUE(layout, kDecode);
    MPD_VALUE(layout, kStatistics);
    MPD_VALUE(layout, kDifference);
    MPD_VALUE(layout, kMove);
    MPD_VALUE(layout, kAverage);
    MPD_STRUCT(layout, MpdNodeSetup);
    MPD_FIELD(layout, MpdNodeSetup, rank);
    MPD_FIELD(layout, MpdNodeSetup, size);
    MPD_FIELD(layout, MpdNodeSetup, publication_slots);
    MPD_FIELD(layout, MpdNodeSetup, inbox_slots);
    MPD_FIELD(layout, MpdNodeSetup, max_claims);
    MPD_FIELD(layout, MpdNodeSetup, first_slot_word);
    MPD_FIELD(layout, MpdNodeSetup, head_word);
    MPD_FIELD(layout, MpdNodeSetup, nbytes);
    MPD_FIELD(layout, MpdNodeSetup, words);
    MPD_FIELD(layout, MpdNodeSetup, slots);
    MPD_FIELD(layout, MpdNodeSetup, counters);
    MPD_FIELD(layout, MpdNodeSetup, read);
    MPD_FIELD(layout, MpdNodeSetup, swap);
    MPD_FIELD(layout, MpdNodeSetup, fence);
    MPD_STRUCT(layout, MpdArrival);
    MPD_FIELD(layout, MpdArrival, sender);
    MPD_FIELD(layout, MpdArrival, slot);
    MPD_STRUCT(layout, MpdTransportCounters);
    MPD_FIELD(layout, MpdTransportCounters, messages);
    MPD_FIELD(layout, MpdTransportCounters, bytes_sent);
    MPD_FIELD(layout, MpdTransportCounters, bytes_received);
    MPD_FIELD(layout, MpdTransportCounters, absorbed);
    MPD_FIELD(layout, MpdTransportCounters, publications);
    MPD_FIELD(layout, MpdTransportCounters, publications_skipped);
    MPD_FIELD(layout, MpdTransportCounters, claims_lost);
    MPD_FIELD(layout, MpdTransportCounters, inbox_full);
    MPD_FIELD(layout, MpdTransportCounters, torn_reads);
    MPD_FIELD(layout, MpdTransportCounters, skipped);
    MPD_STRUCT(layout, MpdPairExchangeSetup);
    MPD_FIELD(layout, MpdPairExchangeSetup, node);
    MPD_FIELD(layout, MpdPairExchangeSetup, records);
    MPD_FIELD(layout, MpdPairExchangeSetup, codec);
    MPD_FIELD(layout, MpdPairExchangeSetup, weight);
    MPD_STRUCT(layout, MpdPairResult);
    MPD_FIELD(layout, MpdPairResult, bad_rank);
    MPD_FIELD(layout, MpdPairResult, bad_slot);
    MPD_STRUCT(layout, MpdSeeds);
    MPD_FIELD(layout, MpdSeeds, start);
    MPD_FIELD(layout, MpdSeeds, drawn);
    MPD_STRUCT(layout, MpdAdaptiveScale);
    MPD_FIELD(layout, MpdAdaptiveScale, estimate);
    MPD_FIELD(layout, MpdAdaptiveScale, floor);
    MPD_FIELD(layout, MpdAdaptiveScale, last);
    MPD_FIELD(layout, MpdAdaptiveScale, buckets);
    MPD_FIELD(layout, MpdAdaptiveScale, encodings);
    MPD_FIELD(layout, MpdAdaptiveScale, refresh_encodings);
    MPD_FIELD(layout, MpdAdaptiveScale, scale_per_distance);
    MPD_FIELD(layout, MpdAdaptiveScale, decay);
    MPD_FIELD(layout, MpdAdaptiveScale, max_estimate);
    MPD_FIELD(layout, MpdAdaptiveScale, doubles_estimate);
    MPD_STRUCT(layout, MpdBucketCounts);
    MPD_FIELD(layout, MpdBucketCounts, decoded);
    MPD_FIELD(layout, MpdBucketCounts, rejected);
    MPD_FIELD(layout, MpdBucketCounts, corrupt);
    MPD_STRUCT(layout, MpdPairCodec);
    MPD_FIELD(layout, MpdPairCodec, bits);
    MPD_FIELD(layout, MpdPairCodec, nearest);
    MPD_FIELD(layout, MpdPairCodec, threads);
    MPD_FIELD(layout, MpdPairCodec, elements);
    MPD_FIELD(layout, MpdPairCodec, seeds);
    MPD_FIELD(layout, MpdPairCodec, scale);
    MPD_FIELD(layout, MpdPairCodec, counts);
    MPD_FIELD(layout, MpdPairCodec, magic);
    MPD_FIELD(layout, MpdPairCodec, version);
    MPD_FIELD(layout, MpdPairCodec, codec);
    MPD_FIELD(layout, MpdPairCodec, nbytes);
    MPD_FIELD(layout, MpdPairCodec, scales_at);
    MPD_FIELD(layout, MpdPairCodec, checksums_at);
    MPD_FIELD(layout, MpdPairCodec, payload_at);
    MPD_VALUE(layout, kDiverged);
    return layout;
  }();
  return all.text();
}
