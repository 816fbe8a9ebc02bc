// lattice.cu as a library for the CPU; Python looks its kernels up by their names and launches them
// here.
#include "cuda_shim.h"  // first: lattice.cu needs its definitions

#include "../../mpi_dasgd/kernels/cpu/struct_layout.h"
#include "../../mpi_dasgd/kernels/cuda/lattice.cu"

extern "C" {

const char* mpd_struct_layout() {
  static const StructLayout all = [] {
    StructLayout layout;
    describe_layout(layout);
    MPD_VALUE(layout, MPD_MAX_DELTAS);
    MPD_VALUE(layout, MPD_THREADS);
    MPD_STRUCT(layout, MpdKernelArguments);
    MPD_FIELD(layout, MpdKernelArguments, x);
    MPD_FIELD(layout, MpdKernelArguments, elements);
    MPD_FIELD(layout, MpdKernelArguments, partner_model);
    MPD_FIELD(layout, MpdKernelArguments, reply_delta);
    MPD_FIELD(layout, MpdKernelArguments, publication);
    MPD_FIELD(layout, MpdKernelArguments, deltas);
    MPD_FIELD(layout, MpdKernelArguments, delta_stats);
    MPD_FIELD(layout, MpdKernelArguments, stats);
    MPD_FIELD(layout, MpdKernelArguments, velocity);
    MPD_FIELD(layout, MpdKernelArguments, gradient);
    MPD_FIELD(layout, MpdKernelArguments, weight);
    MPD_FIELD(layout, MpdKernelArguments, lr);
    MPD_FIELD(layout, MpdKernelArguments, momentum);
    MPD_FIELD(layout, MpdKernelArguments, weight_decay);
    MPD_FIELD(layout, MpdKernelArguments, delta_count);
    MPD_FIELD(layout, MpdKernelArguments, subtract_dither);
    return layout;
  }();
  return all.text();
}

void mpd_launch(void (*kernel)(MpdKernelArguments), const MpdKernelArguments* args, unsigned grid,
                unsigned block) {
  shim::launch(grid, block, [=] { kernel(*args); });
}
}
