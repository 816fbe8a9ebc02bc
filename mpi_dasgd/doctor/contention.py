"""Whether swaps of one word by its owner and by another rank are atomic with each other.

A library may swap a word of its own node by other means than one of another node: then each is right by
itself, and some are lost where they meet.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpi_dasgd.doctor.check import FAILS, OK, Check
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.world import polled_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.transport.control_words import Words

__all__ = ["check", "count_up"]

_SECONDS = (
    3.0  # without its hint (`transport/rma/windows.py`) Open MPI lost 1.5 swaps a second over TCP
)
_PROGRESS = (
    5e-5  # seconds between calls into MPI: other nodes' swaps come in the middle of the owner's
)


def check(comm: MPI.Intracomm, words: Words, where: str, other: int) -> Check:
    """Let rank 0 and rank `other` swap a word of rank 0. Collective."""
    swaps, lost = count_up(comm, words, other, _SECONDS)
    values = {"swaps": swaps, "lost": lost}
    name = f"swaps, {where}"
    if lost:
        text = (
            f"{lost} of {swaps} swaps of one word by two ranks were lost: versions could be overwritten "
            "while they are read; install another MPI"
        )
        return Check(name, FAILS, text, values)
    return Check(name, OK, f"none of {swaps} swaps of one word by two ranks was lost", values)


def count_up(comm: MPI.Intracomm, words: Words, other: int, seconds: float) -> tuple[int, int]:
    """Have rank 0 and rank `other` count word 0 of rank 0 up, by swaps, at the same time. Collective.

    Returns:
        How many swaps succeeded, and how many of them the word does not show.
    """
    before = words.read(0, 0) if comm.rank == 0 else 0
    polled_barrier(comm)
    counted = 0
    courier = ProgressThread(lambda: None, 1.0, comm.Iprobe, _PROGRESS)
    if comm.rank in (0, other):
        deadline = time.monotonic() + seconds
        seen = words.read(0, 0)
        while time.monotonic() < deadline:
            for _ in range(20):
                if words.swap(0, 0, seen, seen + 1):
                    counted += 1
                    seen += 1
                else:
                    seen = words.read(0, 0)
    polled_barrier(comm)
    courier.close()
    total = comm.allreduce(counted)
    after = words.read(0, 0) if comm.rank == 0 else 0
    return total, comm.bcast(before + total - after)
