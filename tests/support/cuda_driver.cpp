// The CUDA sources as a library for the CPU; Python looks the kernels up by their names and launches
// them here.
#include "cuda_shim.h"  // first: the sources need its definitions

#include "../../mpi_dasgd/kernels/cpu/struct_layout.h"
#include "../../mpi_dasgd/kernels/cuda/average.cu"
#include "../../mpi_dasgd/kernels/cuda/lattice.cu"
#include "../../mpi_dasgd/kernels/cuda/optimizer.cu"
#include "../../mpi_dasgd/kernels/cuda/scale.cu"
#include "../../mpi_dasgd/kernels/cuda/table.cu"

template <class Arguments>
static int launch(void (*kernel)(Arguments), const void* arguments, size_t nbytes, unsigned grid,
                  unsigned block) {
  if (nbytes != sizeof(Arguments)) return 1;
  const Arguments copy = *static_cast<const Arguments*>(arguments);
  shim::launch(grid, block, [=] { kernel(copy); });
  return 0;
}

extern "C" {

const char* mpd_struct_layout() {
  static const StructLayout all = [] {
    StructLayout layout;
    describe_layout(layout);
    MPD_VALUE(layout, MPD_MAX_DELTAS);
    MPD_VALUE(layout, MPD_THREADS);
    MPD_STRUCT(layout, MpdRange);
    MPD_STRUCT(layout, MpdKernelArguments);
    MPD_FIELD(layout, MpdKernelArguments, x);
    MPD_FIELD(layout, MpdKernelArguments, elements);
    MPD_FIELD(layout, MpdKernelArguments, partner_model);
    MPD_FIELD(layout, MpdKernelArguments, reply_delta);
    MPD_FIELD(layout, MpdKernelArguments, publication);
    MPD_FIELD(layout, MpdKernelArguments, deltas);
    MPD_FIELD(layout, MpdKernelArguments, delta_stats);
    MPD_FIELD(layout, MpdKernelArguments, stats);
    MPD_FIELD(layout, MpdKernelArguments, weight);
    MPD_FIELD(layout, MpdKernelArguments, delta_count);
    MPD_FIELD(layout, MpdKernelArguments, subtract_dither);
    MPD_FIELD(layout, MpdKernelArguments, optimizer);
    MPD_STRUCT(layout, MpdScaleArguments);
    MPD_FIELD(layout, MpdScaleArguments, x);
    MPD_FIELD(layout, MpdScaleArguments, elements);
    MPD_FIELD(layout, MpdScaleArguments, buckets);
    MPD_FIELD(layout, MpdScaleArguments, estimate);
    MPD_FIELD(layout, MpdScaleArguments, floor);
    MPD_FIELD(layout, MpdScaleArguments, last);
    MPD_FIELD(layout, MpdScaleArguments, max_estimate);
    MPD_FIELD(layout, MpdScaleArguments, largest);
    MPD_FIELD(layout, MpdScaleArguments, ranges);
    MPD_FIELD(layout, MpdScaleArguments, partial);
    MPD_FIELD(layout, MpdScaleArguments, totals);
    MPD_FIELD(layout, MpdScaleArguments, out);
    MPD_FIELD(layout, MpdScaleArguments, delta_stats);
    MPD_FIELD(layout, MpdScaleArguments, delta_units);
    MPD_FIELD(layout, MpdScaleArguments, stats);
    MPD_FIELD(layout, MpdScaleArguments, partner_scales);
    MPD_FIELD(layout, MpdScaleArguments, scale_per_distance);
    MPD_FIELD(layout, MpdScaleArguments, decay);
    MPD_FIELD(layout, MpdScaleArguments, inverse_weight);
    MPD_FIELD(layout, MpdScaleArguments, doubles_estimate);
    MPD_FIELD(layout, MpdScaleArguments, delta_count);
    MPD_FIELD(layout, MpdScaleArguments, adds);
    MPD_FIELD(layout, MpdScaleArguments, warps);
    MPD_STRUCT(layout, MpdAverageArguments);
    MPD_FIELD(layout, MpdAverageArguments, x);
    MPD_FIELD(layout, MpdAverageArguments, elements);
    MPD_FIELD(layout, MpdAverageArguments, partner_model);
    MPD_FIELD(layout, MpdAverageArguments, deltas);
    MPD_FIELD(layout, MpdAverageArguments, reply_delta);
    MPD_FIELD(layout, MpdAverageArguments, publication);
    MPD_FIELD(layout, MpdAverageArguments, partial);
    MPD_FIELD(layout, MpdAverageArguments, square);
    MPD_FIELD(layout, MpdAverageArguments, minus_weight);
    MPD_FIELD(layout, MpdAverageArguments, delta_count);
    MPD_FIELD(layout, MpdAverageArguments, warps);
    MPD_FIELD(layout, MpdAverageArguments, optimizer);
    MPD_STRUCT(layout, MpdOptimizerArguments);
    MPD_FIELD(layout, MpdOptimizerArguments, x);
    MPD_FIELD(layout, MpdOptimizerArguments, elements);
    MPD_FIELD(layout, MpdOptimizerArguments, optimizer);
    MPD_STRUCT(layout, MpdTableArguments);
    MPD_FIELD(layout, MpdTableArguments, to);
    MPD_FIELD(layout, MpdTableArguments, count);
    MPD_FIELD(layout, MpdTableArguments, words);
    return layout;
  }();
  return all.text();
}

// A launch by the name of the kernels' argument; they return 0, or 1 if it has another size.
#define MPD_LAUNCH(Arguments)                                                             \
  int launch_##Arguments(void (*kernel)(Arguments), const void* arguments, size_t nbytes, \
                         unsigned grid, unsigned block) {                                 \
    return launch(kernel, arguments, nbytes, grid, block);                                \
  }
MPD_LAUNCH(MpdKernelArguments)
MPD_LAUNCH(MpdScaleArguments)
MPD_LAUNCH(MpdAverageArguments)
MPD_LAUNCH(MpdOptimizerArguments)
MPD_LAUNCH(MpdTableArguments)

// From now on odd lanes find this word changed, as if another process wrote there; null: none.
void mpd_tear(unsigned* word) { shim::torn = word; }
}
