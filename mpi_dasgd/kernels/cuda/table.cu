// Writes a part of a table in the memory of a device. The words come in the argument of the launch,
// which the driver copies before the call returns: no memory of the host must stay as it is until
// the device reads it.
#include "lane.h"

#define MPD_TABLE_WORDS 500  // the arguments of a launch have room for 4 KiB

// Argument of a launch, passed by value; mirrored in kernels/cuda/table.py.
struct MpdTableArguments {
  mpd_u64* to;
  long long count;
  mpd_u64 words[MPD_TABLE_WORDS];
};

extern "C" __global__ void __launch_bounds__(MPD_THREADS)
    mpd_write_table(const __grid_constant__ MpdTableArguments args) {
  if (blockIdx.x != 0) return;
  for (unsigned i = threadIdx.x; i < args.count; i += blockDim.x) args.to[i] = args.words[i];
}
