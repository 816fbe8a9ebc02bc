"""Latency of operations on control words, and whether an update gets lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mpi_dasgd.doctor.check import FAILS, OK, Check
from mpi_dasgd.doctor.timing import describe_latencies, latency_percentiles, time_calls
from mpi_dasgd.world import polled_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.transport.control_words import Words

__all__ = ["check"]

_SECONDS = 0.1  # duration of the measurement per operation


def check(
    comm: MPI.Intracomm, window_words: Words, atomic_words: Words | None, where: str, target: int
) -> Check:
    """Measure reads and swaps of a control word of `target` by rank 0. Collective.

    The target polls a barrier meanwhile, so it enters MPI from time to time.

    Args:
        comm: communicator of all ranks.
        window_words: control words in an MPI window, at least two per rank.
        atomic_words: the same in shared memory by atomic instructions; None: not measured.
        where: place of `target` relative to rank 0, part of the check's name.
        target: the rank whose word 1 is read and changed.

    Returns:
        The finding; that of rank 0 counts.
    """
    measured: dict[tuple[str, str], Words] = {("fetch_and_op", "compare_and_swap"): window_words}
    if atomic_words is not None:
        measured["atomic_read", "atomic_swap"] = atomic_words
    values: dict[str, float] = {}
    lossy: list[str] = []
    for (read_name, swap_name), words in measured.items():
        polled_barrier(comm)
        if comm.rank == 0:
            initial = words.read(target, 1)
            reads = time_calls(partial(words.read, target, 1), _SECONDS)
            swaps = time_calls(_incrementer(words, target), _SECONDS)
            values |= latency_percentiles(read_name, reads)
            values |= latency_percentiles(swap_name, swaps)
            if words.read(target, 1) != initial + len(swaps):
                lossy.append(swap_name)
        polled_barrier(comm)
    name = f"words, {where}"
    if lossy:
        text = f"{' and '.join(lossy)} lost an update: install another MPI"
        return Check(name, FAILS, text, values)
    return Check(name, OK, describe_latencies(values), values)


def _incrementer(words: Words, rank: int) -> Callable[[], None]:
    """Return a function that adds one to word 1 of `rank`, which no other rank changes."""
    value = words.read(rank, 1)

    def increment() -> None:
        nonlocal value
        words.swap(rank, 1, value, value + 1)
        value += 1

    return increment
