"""Where the ranks of a node meet between measurements, without keeping a core busy."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

__all__ = ["MeetingPoint"]

# Between two looks at the others. MPI's barriers poll at full speed, or call MPI at each look.
_POLL_SECONDS = 5e-4


class MeetingPoint:
    """Words of all ranks in a file that they map, one writer each.

    Args:
        path: file that `create` has made.
        rank: number of this rank.
    """

    def __init__(self, path: Path, rank: int) -> None:
        words = np.memmap(path, np.int64, "r+")
        self._arrived, self._done = words.reshape(2, -1)
        self._rank = rank

    @staticmethod
    def create(path: Path, size: int) -> None:
        """Make the file for `size` ranks, before any of them opens it."""
        np.zeros(2 * size, np.int64).tofile(path)

    def meet(self) -> None:
        """Wait until all ranks have come. Collective."""
        self._arrived[self._rank] += 1
        own = self._arrived[self._rank]
        while (self._arrived < own).any():
            time.sleep(_POLL_SECONDS)

    def report_done(self) -> None:
        """Say that this rank has done what it came for, since it came to the last meeting."""
        self._done[self._rank] = self._arrived[self._rank]

    def have_done(self, count: int) -> bool:
        """Return whether the first `count` ranks have reported that, since the same meeting."""
        return bool((self._done[:count] >= self._arrived[self._rank]).all())
