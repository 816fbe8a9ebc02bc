"""Lost updates when the owner of a control word and another rank swap it at the same time.

An MPI library may carry out compare-and-swap on its own node by other means than on another node.
Then each of the two is atomic by itself, but they are not atomic with respect to each other.
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

# Seconds: without the hint in `transport/rma/windows.py` Open MPI lost 1.5 swaps per second (TCP).
_DURATION = 3.0
# Seconds between calls into MPI: short, so that swaps of other nodes interrupt those of the owner.
_PROGRESS_INTERVAL = 5e-5


def check(comm: MPI.Intracomm, words: Words, where: str, target: int) -> Check:
    """Let rank 0 and rank `target` swap a word of rank 0, and count lost swaps. Collective.

    Args:
        comm: communicator of all ranks.
        words: control words.
        where: place of `target` relative to rank 0, part of the check's name.
        target: the other rank.
    """
    swaps, lost = count_up(comm, words, target, _DURATION)
    values = {"swaps": swaps, "lost": lost}
    name = f"swaps, {where}"
    if lost:
        text = (
            f"{lost} of {swaps} swaps of one word by two ranks were lost: versions could be "
            "overwritten while they are read; install another MPI"
        )
        return Check(name, FAILS, text, values)
    return Check(name, OK, f"none of {swaps} swaps of one word by two ranks was lost", values)


def count_up(comm: MPI.Intracomm, words: Words, target: int, seconds: float) -> tuple[int, int]:
    """Let rank 0 and rank `target` increment word 0 of rank 0 concurrently by swaps. Collective.

    Args:
        comm: communicator of all ranks.
        words: control words.
        target: the other rank.
        seconds: duration.

    Returns:
        Number of swaps that succeeded, and how many of them the word does not show.
    """
    before = words.read(0, 0) if comm.rank == 0 else 0
    polled_barrier(comm)
    succeeded = 0
    progress_thread = ProgressThread(lambda: None, 1.0, comm.Iprobe, _PROGRESS_INTERVAL)
    if comm.rank in (0, target):
        deadline = time.monotonic() + seconds
        value = words.read(0, 0)
        while time.monotonic() < deadline:
            for _ in range(20):
                if words.swap(0, 0, value, value + 1):
                    succeeded += 1
                    value += 1
                else:
                    value = words.read(0, 0)
    polled_barrier(comm)
    progress_thread.close()
    total = comm.allreduce(succeeded)
    after = words.read(0, 0) if comm.rank == 0 else 0
    return total, comm.bcast(before + total - after)
