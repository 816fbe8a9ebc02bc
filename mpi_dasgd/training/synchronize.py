"""Collective operations on the models of all ranks: before training, and after it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.training.flat_parameters import FlatParameters

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["average_models", "broadcast_parameters"]


def broadcast_parameters(comm: MPI.Intracomm, parameters: FlatParameters) -> None:
    """Copy parameters and buffers of rank 0 to all ranks, and verify the copies. Collective.

    Args:
        comm: communicator of all ranks.
        parameters: parameters of this rank's model.

    Raises:
        UserError: the ranks' models are of different sizes.
        PeerLost: a rank has other weights than rank 0 afterwards.
    """
    buffers = parameters.buffers()
    sizes = comm.allgather((parameters.size, buffers.size))
    if len(set(sizes)) > 1:
        raise UserError(
            "model: the ranks must have the same model, but the numbers of parameters and buffer "
            f"elements are {sizes}"
        )
    comm.Bcast(parameters.host_view, root=0)
    parameters.copy_to_device()
    comm.Bcast(buffers, root=0)
    parameters.set_buffers(buffers)
    digests = comm.allgather(parameters.digest())
    if len(set(digests)) > 1:
        raise PeerLost(f"the ranks do not have the same initial weights: {digests}")


def average_models(
    comm: MPI.Intracomm,
    parameters: FlatParameters,
    ranks: Collection[int],
    workers: Collection[int],
) -> None:
    """Replace all models by the mean of those of `ranks`. Collective.

    Args:
        comm: communicator of all ranks.
        parameters: parameters of this rank's model.
        ranks: ranks whose parameters are averaged, in float64.
        workers: ranks whose buffers are averaged, in float64.
    """
    from mpi4py import MPI  # not before: it starts MPI

    total = (comm.rank in ranks) * parameters.host_view.astype(np.float64)
    buffers = (comm.rank in workers) * parameters.buffers()
    comm.Allreduce(MPI.IN_PLACE, total)
    comm.Allreduce(MPI.IN_PLACE, buffers)
    parameters.set((total / len(ranks)).astype(np.float32))
    parameters.set_buffers(buffers / len(workers))
