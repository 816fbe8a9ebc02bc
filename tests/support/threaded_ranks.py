"""Ranks as threads, with the few collective calls that do not need MPI itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class Comm:
    """Communicator of one of several threads: what a rank receives is a copy.

    Args:
        rank, size: this rank, and the number of ranks.
        slots: what the ranks give in a call, shared by all.
        barrier: of all ranks.

    Attributes:
        sent: lengths of the bytes that this rank has given to the others.
    """

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self.sent: list[int] = []
        self._slots, self._barrier = slots, barrier

    def allgather(self, value: T) -> list[T]:
        """Return what all ranks give."""
        self.sent += [len(value)] if isinstance(value, bytes) else []
        self._slots[self.rank] = value
        self._barrier.wait(20)
        gathered = copy.deepcopy(self._slots)
        self._barrier.wait(20)
        return gathered

    def Bcast(self, array: np.ndarray, root: int) -> None:  # noqa: N802
        """Copy the array of `root`."""
        array[:] = self.allgather(array)[root]


def on_ranks(size: int, program: Callable[[Any], T]) -> list[T]:
    """Run `program` on `size` ranks, each with its communicator; return what each returns.

    The first error of a rank is raised; the others must not be left waiting.
    """
    barrier, slots = threading.Barrier(size), [None] * size
    comms = [Comm(rank, size, slots, barrier) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(program, comm) for comm in comms]
        return [future.result(60) for future in futures]


def errors_on_ranks(size: int, program: Callable[[Any], object], error: type[Exception]) -> str:
    """Return the message of the `error` that all ranks raise, and only if it is one message."""

    def expect(comm: Any) -> str:
        try:
            program(comm)
        except error as raised:
            return str(raised)
        return "no error"

    messages = set(on_ranks(size, expect))
    assert len(messages) == 1, messages
    return messages.pop()
