"""Checks between two ranks of a node and of two nodes: progress, latency, lost swaps, bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from mpi_dasgd.doctor import bandwidth, contention, latency, mpi_progress
from mpi_dasgd.doctor.check import Check
from mpi_dasgd.world import peers_by_node

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.codecs.message import Layout
    from mpi_dasgd.world import World

__all__ = ["checks"]


def checks(environment: World) -> list[Check]:
    """Measure between rank 0 and one rank of its node and one rank of another node. Collective.

    Returns:
        The findings; those of rank 0 count.
    """
    from mpi4py import MPI

    from mpi_dasgd.kernels import native
    from mpi_dasgd.transport.rma.shared_memory import NodeWords
    from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords

    comm = environment.comm
    same_node, other_node = peers_by_node(comm)
    targets = [
        (where, rank)
        for where, rank in (("same node", same_node), ("other node", other_node))
        if rank is not None
    ]
    library = native.load()
    has_atomics = environment.nodes == 1 and comm.allreduce(library is not None, MPI.LAND)
    node_comm = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED))
    payload_layout = _layout(bandwidth.PAYLOAD_BYTES)

    window_words = WindowWords(comm, 2)
    atomic_words = NodeWords(comm, 2, library) if has_atomics and library is not None else None
    shared_slots = (
        WindowSlots(comm, node_comm, payload_layout, 1) if same_node is not None else None
    )
    remote_slots = WindowSlots(comm, node_comm, payload_layout, 1, "rma")
    put_slots = WindowSlots(comm, node_comm, _layout(mpi_progress.PUT_BYTES), 1, "rma")
    node_comm.Free()

    findings = [
        mpi_progress.check(comm, window_words, put_slots, where, rank) for where, rank in targets
    ]
    findings += [
        latency.check(comm, window_words, atomic_words, where, rank) for where, rank in targets
    ]
    if atomic_words is None:
        findings += [contention.check(comm, window_words, where, rank) for where, rank in targets]
    for where, rank in targets:
        slots_in_place = shared_slots if rank == same_node else None
        findings.append(bandwidth.check(comm, remote_slots, slots_in_place, where, rank))

    for slots in (put_slots, remote_slots, shared_slots):
        if slots is not None:
            slots.close()
    window_words.close()
    if atomic_words is not None:
        atomic_words.close()
    return findings


def _layout(nbytes: int) -> Layout:
    """Return the layout of a message with `nbytes` bytes of float32 payload."""
    from mpi_dasgd.codecs.none import NoCodec

    return NoCodec(nbytes // 4, np.dtype(np.float32)).layout
