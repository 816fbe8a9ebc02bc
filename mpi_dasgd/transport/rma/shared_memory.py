"""Control words in memory that all ranks share, changed by the processor's own atomic instructions.

For jobs on one node. `Fetch_and_op` and `Compare_and_swap` would do the same at four times the
cost; and where other work shares the cores, MPICH yields the core in every flush of a
thread-multiple job: a step that needs 25 words then loses milliseconds (docs/architecture.md has
the figures).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from mpi4py import MPI

__all__ = ["NodeWords"]


class NodeWords:
    """Control words of ranks that share memory. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks; they must be on one node.
        count: number of words per rank.
        library: the native library, as `mpi_dasgd.kernels.native.load` returns it.
    """

    def __init__(self, comm: MPI.Intracomm, count: int, library: ctypes.CDLL) -> None:
        self._window: MPI.Win | None = MPI.Win.Allocate_shared(8 * count, 8, comm=comm)
        segments = [self._window.Shared_query(rank)[0] for rank in range(comm.size)]
        self._addresses: list[int] = [
            np.frombuffer(segment, np.int64).ctypes.data for segment in segments
        ]
        np.frombuffer(segments[comm.rank], np.int64)[:] = 0
        comm.Barrier()
        self._read = library.mpd_word_read
        self._read.argtypes, self._read.restype = [ctypes.c_void_p], ctypes.c_int64
        self._swap = library.mpd_word_swap
        self._swap.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self._swap.restype = ctypes.c_int

    def read(self, rank: int, index: int) -> int:
        """Return word `index` of `rank`, atomically."""
        return self._read(self._addresses[rank] + 8 * index)

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        """Set a word to `new` if it is `expected`, atomically; return whether it was."""
        return self._swap(self._addresses[rank] + 8 * index, expected, new) != 0

    def address(self, rank: int, index: int) -> int:
        """Return where word `index` of `rank` is, in this process."""
        return self._addresses[rank] + 8 * index

    def close(self) -> None:
        """Free the memory."""
        if self._window is not None:
            window, self._window = self._window, None
            self._addresses = _Closed()
            window.Free()


class _Closed(list[int]):
    """Addresses of freed words: using one raises, and no check is needed while they are in use."""

    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError("transport is closed")
