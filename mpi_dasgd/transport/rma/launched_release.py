"""A release that native code makes, in the order of a device's work, without waiting for Python.

The swaps that were asked for between two flushes are a *batch*. `flush` has the device run
``mpd_release`` on it (``kernels/cpu/release.cpp``) behind all work so far: in a thread of the
driver, which takes neither the GIL nor calls the device.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeGuard

import numpy as np

from mpi_dasgd.device.base import Device
from mpi_dasgd.errors import DeviceFailed, UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.release import Immediate, Release, Synced

if TYPE_CHECKING:  # their import starts MPI
    from mpi4py import MPI

    from mpi_dasgd.transport.rma.shared_memory import NodeWords
    from mpi_dasgd.transport.rma.windows import WindowWords

__all__ = ["MAX_SWAPS", "RELEASE", "SWAP", "Launched", "make_release"]

MAX_SWAPS = 80
"""Swaps of a batch: MPD_MAX_SWAPS of ``release.h``."""

SWAP = np.dtype([(name, np.int64) for name in ("word", "expected", "desired", "required")])
"""Mirror of MpdSwap of ``release.h``."""

RELEASE = np.dtype(
    [*((name, np.int64) for name in ("count", "failed", "done")), ("swaps", SWAP, (MAX_SWAPS,))]
)
"""Mirror of MpdRelease of ``release.h``: a batch."""

_BATCHES = 32  # some steps' worth: the host is rarely more than one ahead
_TIMEOUT_SECONDS = 60.0  # for the device to pass 32 batches
_POLL_SECONDS = 1e-4
_FAILED, _DONE, _HEADER = 1, 2, 3  # places in a batch, in integers: that of the swaps is last


class _Batch(NamedTuple):
    """A batch in memory: its integers, and its address."""

    values: np.ndarray
    address: int


class Launched:
    """Swaps in a thread of the device's driver, when the device has passed: a `Release`.

    Args:
        words: control words of all ranks.
        device: device of this rank.
        library: the native library, as `mpi_dasgd.kernels.native.load` returns it.
        batches: number of batches that may be on their way at a time.
        timeout: seconds that `flush` waits if so many are.
    """

    # Batches on their way must outlive this object, if it is dropped without being closed.
    _on_their_way: ClassVar[set[Launched]] = set()

    def __init__(
        self,
        words: NodeWords,
        device: Device,
        library: ctypes.CDLL,
        *,
        batches: int = _BATCHES,
        timeout: float = _TIMEOUT_SECONDS,
    ) -> None:
        self._address = words.address
        self._device = device
        self._timeout = timeout
        function = ctypes.cast(library.mpd_release, ctypes.c_void_p).value
        assert function is not None, "a function of the library has an address"
        self._function = function
        self._read = library.mpd_word_read  # atomic: another thread writes `done`
        self._read.argtypes, self._read.restype = [ctypes.c_void_p], ctypes.c_int64
        memory = np.zeros((batches, RELEASE.itemsize // 8), np.int64)
        self._unused = deque(_Batch(row, row.ctypes.data) for row in memory)
        self._launched: deque[_Batch] = deque()
        self._values: list[int] = []  # of the swaps since the last flush
        self._failures: list[str] = []

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> None:
        """Have a word set to `new` if it is `expected`, behind the work asked for so far."""
        if len(self._values) == 4 * MAX_SWAPS:
            self.flush()
        self._values += (self._address(rank, index), expected, new, required)

    def flush(self) -> None:
        """Have the device make the swaps when it has passed all work that was asked for so far.

        Raises:
            DeviceFailed: the device has failed, or has not passed earlier swaps for too long.
            RuntimeError: a required swap of an earlier flush has found another word.
        """
        if not (self._values or self._launched or self._failures):
            return
        self._collect()
        if self._failures:
            raise RuntimeError(f"the protocol is broken: {'; '.join(self._failures)}")
        if not self._values:
            return
        if not self._unused:
            self._await_batch()
        batch = self._unused.popleft()
        values, self._values = self._values, []
        batch.values[: _HEADER + len(values)] = [len(values) // 4, 0, 0, *values]
        self._launched.append(batch)
        self._on_their_way.add(self)
        self._device.run_after(self._function, batch.address)

    def _await_batch(self) -> None:
        """Wait until the oldest batch is done."""
        deadline = time.monotonic() + self._timeout
        while not self._unused:
            if time.monotonic() > deadline:
                raise DeviceFailed(
                    f"the device has not come to the end of a step for {self._timeout:g} s"
                )
            time.sleep(_POLL_SECONDS)
            _check(self._device)
            self._collect()

    def _collect(self) -> None:
        """Take back the batches that are done, and note which of their required swaps failed."""
        launched = self._launched
        while launched and self._read(launched[0].address + 8 * _DONE):
            batch = launched.popleft()
            if failed := int(batch.values[_FAILED]):
                swap = batch.values.view(RELEASE)["swaps"][0, failed - 1]
                self._failures.append(
                    f"a word was not {swap['expected']:#x}, and could not become "
                    f"{swap['desired']:#x}"
                )
            self._unused.append(batch)
        if not launched:
            self._on_their_way.discard(self)

    @property
    def is_pending(self) -> bool:
        """Whether swaps are still to be made.

        Raises:
            DeviceFailed: the device has failed, so that it will not make them.
        """
        if not self._values and not self._launched:
            return False
        self._collect()
        if self._launched:
            _check(self._device)
        return bool(self._values or self._launched)


def _check(device: Device) -> None:
    """Raise if the device has failed.

    Raises:
        DeviceFailed: it has.
    """
    device.mark().is_done  # noqa: B018


def _is_in_memory_of_the_node(words: NodeWords | WindowWords) -> TypeGuard[NodeWords]:
    from mpi_dasgd.transport.rma.shared_memory import NodeWords  # not before: it starts MPI

    return isinstance(words, NodeWords)


def make_release(comm: MPI.Intracomm, words: NodeWords | WindowWords, device: Device) -> Release:
    """Return the release for words of that kind, and work on that device. Collective.

    Raises:
        UserError: the native library is an older one, without ``mpd_release``.
    """
    if not device.is_asynchronous:
        return Immediate(words)
    if not _is_in_memory_of_the_node(words):
        return Synced(words, device)
    library = native.load()
    assert library is not None, "it serves the words already"
    if not all(comm.allgather(hasattr(library, "mpd_release"))):
        raise UserError(
            f"transport.memory: a model on {device.name} needs native kernels of this version, but "
            "those here are older; run `pip install .` again"
        )
    return Launched(words, device, library)
