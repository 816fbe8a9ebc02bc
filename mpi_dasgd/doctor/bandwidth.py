"""Bandwidth of payload transfers: Put, Get and a copy in place, compared with memcpy."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.doctor.check import FAILS, OK, Check
from mpi_dasgd.world import polled_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.codecs.message import Layout, Message
    from mpi_dasgd.transport.rma.windows import WindowSlots

__all__ = ["PAYLOAD_BYTES", "check"]

PAYLOAD_BYTES = 16_000_000  # payload of the slots
_REPEATS = 9


def check(
    comm: MPI.Intracomm,
    remote_slots: WindowSlots,
    shared_slots: WindowSlots | None,
    where: str,
    target: int,
) -> Check:
    """Measure transfers between rank 0 and `target`, and compare the bytes. Collective.

    Args:
        comm: communicator of all ranks.
        remote_slots: slots of `PAYLOAD_BYTES`, of float32, that are reached by Get and Put only.
        shared_slots: slots of the same layout in memory that rank 0 shares with `target`; None: not
            measured.
        where: place of `target` relative to rank 0, part of the check's name.
        target: the rank whose slots are read and written.

    Returns:
        The finding; that of rank 0 counts.
    """
    own_message = remote_slots.view(comm.rank, 0)
    assert own_message is not None, "own slots are in place"
    own_message.payload[:] = comm.rank
    shared_message = None if shared_slots is None else shared_slots.view(target, 0)
    if shared_slots is not None and comm.rank == target:
        assert shared_message is not None, "own slots are in place"
        shared_message.payload[:] = target
        shared_slots.fence()
    polled_barrier(comm)
    durations: dict[str, list[float]] = {}
    corrupted: set[str] = set()
    if comm.rank == 0:
        durations, corrupted = _time_transfers(
            remote_slots, own_message.layout, shared_message, target
        )
    polled_barrier(comm)
    values = {
        f"{operation}_mb_per_s": PAYLOAD_BYTES / float(np.median(seconds)) / 1e6
        for operation, seconds in durations.items()
    }
    name = f"payload, {where}"
    if corrupted:
        text = f"{' and '.join(sorted(corrupted))} brought wrong bytes: install another MPI"
        return Check(name, FAILS, text, values)
    rates = ", ".join(
        f"{key.removesuffix('_mb_per_s')} {rate:.0f}" for key, rate in values.items()
    ).replace("_", " ")
    return Check(name, OK, f"MB/s at {PAYLOAD_BYTES / 1e6:.0f} MB: {rates}", values)


def _time_transfers(
    remote_slots: WindowSlots, layout: Layout, shared_message: Message | None, target: int
) -> tuple[dict[str, list[float]], set[str]]:
    """Time each operation `_REPEATS` times, in turn, so that all see the same load of the machine.

    Args:
        remote_slots: slots whose payload on `target` is filled with the number of that rank.
        layout: layout of the slots.
        shared_message: message in a slot of `target` with the same content, reached in place; None:
            not measured.
        target: the rank whose slots are read and written.

    Returns:
        Durations in seconds by operation, and the operations that yielded wrong values.
    """
    from mpi_dasgd.codecs.message import Message

    source = np.full(PAYLOAD_BYTES // 4, -1, np.float32)
    copy = np.zeros(PAYLOAD_BYTES // 4, np.float32)
    received = Message(np.zeros(layout.nbytes, np.uint8), layout)
    operations: dict[str, Callable[[], object]] = {
        "memcpy": lambda: ctypes.memmove(copy.ctypes.data, source.ctypes.data, PAYLOAD_BYTES),
        "get": lambda: remote_slots.get(target, 0, received),
        # Writes back what "get" has received, so the slot keeps its content.
        "put": lambda: remote_slots.put(target, 0, received),
    }
    if shared_message is not None:
        operations["in_place"] = lambda: np.copyto(copy, shared_message.payload)
    expected = {
        "memcpy": (copy, -1),
        "get": (received.payload, target),
        "in_place": (copy, target),
    }
    durations: dict[str, list[float]] = {operation: [] for operation in operations}
    corrupted: set[str] = set()
    for repeat in range(_REPEATS + 1):
        for operation, run in operations.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if operation in expected:
                array, value = expected[operation]
                if not (array == value).all():
                    corrupted.add(operation)
            if repeat:  # the first round also faults the pages in
                durations[operation].append(seconds)
    return durations, corrupted
