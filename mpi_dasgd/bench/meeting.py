"""How ranks of a measurement find each other and wait for each other."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpi4py import MPI

__all__ = ["peers_by_node", "polled_barrier"]

_PAUSE = 1e-4  # seconds between two looks


def peers_by_node(comm: MPI.Intracomm) -> tuple[int | None, int | None]:
    """Return the first rank that shares rank 0's node, and the first that does not. Collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leaders = comm.allgather(node.bcast(comm.rank))
    node.Free()
    near = next((rank for rank, leader in enumerate(leaders) if rank and leader == 0), None)
    far = next((rank for rank, leader in enumerate(leaders) if leader != 0), None)
    return near, far


def polled_barrier(comm: MPI.Comm, serve: Callable[[], object] | None = None) -> None:
    """Wait for all ranks without burning a core, calling `serve` meanwhile. Collective."""
    request = comm.Ibarrier()
    while not request.Test():
        if serve is not None:
            serve()
        time.sleep(_PAUSE)
