// For tests: the layout of the structs of this library, see struct_layout.h.
#include "struct_layout.h"

#include "fused_step.h"
#include "record_ring.h"
#include "release.h"
#include "roofline.h"

extern "C" const char* mpd_struct_layout() {
  static const StructLayout all = [] {
    StructLayout layout;
    describe_layout(layout);
    MPD_STRUCT(layout, MpdFusedStep);
    MPD_FIELD(layout, MpdFusedStep, bits);
    MPD_FIELD(layout, MpdFusedStep, x);
    MPD_FIELD(layout, MpdFusedStep, elements);
    MPD_FIELD(layout, MpdFusedStep, deltas);
    MPD_FIELD(layout, MpdFusedStep, delta_stats);
    MPD_FIELD(layout, MpdFusedStep, delta_count);
    MPD_FIELD(layout, MpdFusedStep, partner_model);
    MPD_FIELD(layout, MpdFusedStep, weight);
    MPD_FIELD(layout, MpdFusedStep, merge);
    MPD_FIELD(layout, MpdFusedStep, stats);
    MPD_FIELD(layout, MpdFusedStep, reply_delta);
    MPD_FIELD(layout, MpdFusedStep, velocity);
    MPD_FIELD(layout, MpdFusedStep, gradient);
    MPD_FIELD(layout, MpdFusedStep, lr);
    MPD_FIELD(layout, MpdFusedStep, momentum);
    MPD_FIELD(layout, MpdFusedStep, weight_decay);
    MPD_FIELD(layout, MpdFusedStep, threads);
    MPD_FIELD(layout, MpdFusedStep, publication);
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
    MPD_VALUE(layout, kTrivial);
    MPD_VALUE(layout, kStreamed);
    MPD_VALUE(layout, kCopy);
    MPD_VALUE(layout, kTriad);
    MPD_VALUE(layout, kDecode);
    MPD_VALUE(layout, kStatistics);
    MPD_VALUE(layout, kDifference);
    MPD_VALUE(layout, kMove);
    MPD_VALUE(layout, kAverage);
    return layout;
  }();
  return all.text();
}
