// lattice.cu as a library for the CPU; Python looks its kernels up by their names and launches them here.
#include "cuda_shim.h"

#include "../../mpi_dasgd/kernels/cuda/lattice.cu"

extern "C" {

int mpd_step_bytes() { return sizeof(MpdStep); }

void mpd_launch(void (*kernel)(MpdStep), const MpdStep* step, unsigned grid, unsigned block) {
  shim::launch(grid, block, [=] { kernel(*step); });
}
}
