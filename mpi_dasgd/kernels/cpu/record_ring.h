// Ring of exchange rows in memory: native code and Python write them, in order, Python takes them.
// storage/record_ring.py makes it and mirrors the structs (tests/kernels/test_struct_layout.py).
#ifndef MPD_CPU_RECORD_RING_H
#define MPD_CPU_RECORD_RING_H
#include <chrono>
#include <cstdint>
#include <limits>

#define MPD_INITIATED 0
#define MPD_ABSORBED 1
#define MPD_SKIPPED 2

// A row of table `exchange`: the columns of storage/schema.py in their order, which says what each
// of them is.
struct MpdExchangeRow {
  int64_t step;
  double time_s;
  int32_t partner;  // -1 if it was skipped
  int8_t kind;
  int64_t partner_step;  // -1 if it was skipped
  int64_t age_steps;
  double age_s;
  int64_t bytes;
  int32_t retries;
  double distance;
  int32_t rejected;
  int64_t set_staleness;  // -1: unknown
};

// One thread writes at a time, the thread that makes the rank's steps; one thread takes.
struct MpdRecordRing {
  MpdExchangeRow* rows;
  int64_t capacity;  // a power of 2
  int64_t written;   // rows ever written
  int64_t taken;     // of these, rows that were taken: their places are free
  double origin_s;   // time on the monotonic clock from which `time_s` counts
};

// Number of rows that can be written now. Who finds too little room writes nothing and has Python
// make room (`RecordRing.spill`): no row is ever lost.
inline int64_t mpd_record_room(const MpdRecordRing* ring) {
  const int64_t taken = __atomic_load_n(&ring->taken, __ATOMIC_ACQUIRE);
  return ring->capacity - (ring->written - taken);
}

// Seconds since the start of the run: Python's `time.monotonic() - origin`, to the bit.
inline double mpd_record_time(const MpdRecordRing* ring) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  const int64_t ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  return static_cast<double>(ns) / 1e9 - ring->origin_s;
}

// Appends a row, for which there is room.
inline void mpd_record(MpdRecordRing* ring, const MpdExchangeRow& row) {
  ring->rows[ring->written & (ring->capacity - 1)] = row;
  __atomic_store_n(&ring->written, ring->written + 1, __ATOMIC_RELEASE);
}

// Appends an exchange with `partner`, now; its model, delta or publication was made at `sent_ns`.
inline void mpd_record_exchange(MpdRecordRing* ring, int8_t kind, int64_t step, int32_t partner,
                                int64_t partner_step, int64_t sent_ns, int64_t now_ns,
                                int64_t bytes, int32_t retries, double distance, int32_t rejected) {
  const double age_s = static_cast<double>(now_ns - sent_ns) * 1e-9;
  mpd_record(ring, {step, mpd_record_time(ring), partner, kind, partner_step, step - partner_step,
                    age_s, bytes, retries, distance, rejected, -1});
}

// Appends that no partner was found at `step`.
inline void mpd_record_skip(MpdRecordRing* ring, int64_t step, int32_t retries) {
  mpd_record(ring,
             {step, mpd_record_time(ring), -1, MPD_SKIPPED, -1, std::numeric_limits<int64_t>::min(),
              0.0, 0, retries, std::numeric_limits<double>::quiet_NaN(), 0, -1});
}

#endif
