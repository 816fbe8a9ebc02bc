"""Ring of rows in memory, which a rank writes in its step and a thread takes to the run file."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpi_dasgd.storage.schema import TABLES

__all__ = ["RING", "RecordRing", "row_dtype"]

_CAPACITY = 4096  # rows; a power of 2
_FORMATS = {"i1": "b", "i4": "i", "i8": "q", "f8": "d"}

RING = np.dtype(
    [("rows", "i8"), ("capacity", "i8"), ("written", "i8"), ("taken", "i8"), ("origin_s", "f8")]
)
"""``MpdRecordRing`` of kernels/cpu/record_ring.h."""

_WRITTEN, _TAKEN = 2, 3  # words of it


def row_dtype(table: str) -> np.dtype:
    """Return the struct of a row: the columns of `table` in order, aligned as C does."""
    return np.dtype([(c.name, c.dtype) for c in TABLES[table]], align=True)


class RecordRing:
    """Rows of one table on their way from a rank's steps to its run file, in order.

    `append`, or native code (kernels/cpu/record_ring.h), writes a row in well under a microsecond,
    without a lock; `take` gets those that were written since it was last called. If the ring is
    full, the writer itself moves its rows to a list (`spill`): no row is lost or overtakes another.

    One thread writes at a time, any threads take.

    Args:
        table: name of the table.
        capacity: rows that the ring holds, a power of 2.

    Attributes:
        dtype: struct of a row.
        address: of the ``MpdRecordRing``, as long as this object lives.
        on_taken: called with the rows that leave the ring, in order, by the thread that takes them;
            may be set.
    """

    def __init__(self, table: str, capacity: int = _CAPACITY) -> None:
        if capacity & (capacity - 1) or capacity < 1:
            raise ValueError(f"capacity: expected a power of 2, got {capacity}")
        self.dtype = row_dtype(table)
        self._capacity, self._mask = capacity, capacity - 1
        self._row_bytes = self.dtype.itemsize
        self.on_taken: Callable[[np.ndarray], object] | None = None
        self._rows = np.full(capacity, np.ones((), self.dtype))  # no page fault in a step
        self._ring = np.array((self._rows.ctypes.data, capacity, 0, 0, 0.0), RING)
        self.address = self._ring.ctypes.data
        self._words = memoryview(self._ring.reshape(1).view(np.int64))
        self._bytes = memoryview(self._rows.view(np.uint8))
        columns = TABLES[table]
        self._pack = struct.Struct("@" + "".join(_FORMATS[c.dtype] for c in columns)).pack_into
        self._lock = threading.Lock()  # of those who take
        self._spilled: list[np.ndarray] = []
        self._origin = 0.0

    @property
    def capacity(self) -> int:
        """Rows that the ring holds."""
        return self._capacity

    @property
    def origin(self) -> float:
        """Time on ``time.monotonic()`` from which `time_s` counts, seconds."""
        return self._origin

    @origin.setter
    def origin(self, seconds: float) -> None:
        self._ring["origin_s"] = self._origin = seconds

    def elapsed(self) -> float:
        """Return the seconds since `origin`."""
        return time.monotonic() - self._origin

    def append(self, *values: Any) -> None:
        """Write a row.

        Args:
            values: of the columns of the table, in order.

        Raises:
            struct.error: values of the wrong type, out of range, too few or too many; nothing was
                written.
        """
        words = self._words
        written = words[_WRITTEN]
        if written - words[_TAKEN] == self._capacity:
            self.spill()
        self._pack(self._bytes, (written & self._mask) * self._row_bytes, *values)
        words[_WRITTEN] = written + 1

    def spill(self) -> None:
        """Make room for as many rows as the ring holds; they are taken in their turn.

        Only the thread that writes calls it.
        """
        with self._lock:
            self._spilled.append(self._copy_new())

    def discard(self) -> None:
        """Forget the rows: of a ring from which nobody takes any."""
        self._words[_TAKEN] = self._words[_WRITTEN]

    def take(self) -> np.ndarray:
        """Return the rows since the last call, (rows,) of `dtype`."""
        with self._lock:
            blocks = [*self._spilled, self._copy_new()]
            self._spilled.clear()
        return np.concatenate(blocks) if len(blocks) > 1 else blocks[0]

    def _copy_new(self) -> np.ndarray:
        """Return what was not taken, and mark it as taken."""
        taken, written = self._words[_TAKEN], self._words[_WRITTEN]
        with _BARRIER:  # what native code wrote before it counted is read after the count
            pass
        rows = self._copy(taken, written)
        with _BARRIER:
            pass
        self._words[_TAKEN] = written
        if self.on_taken is not None and len(rows):
            self.on_taken(rows)
        return rows

    def _copy(self, start: int, stop: int) -> np.ndarray:
        first, last = start & self._mask, stop & self._mask
        if start == stop or first < last:
            return self._rows[first : first + stop - start].copy()
        return np.concatenate([self._rows[first:], self._rows[:last]])


_BARRIER = threading.Lock()  # to take and release a lock orders memory between threads
