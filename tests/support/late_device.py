"""A device of NumPy that is late: the order of control words, proved without a GPU.

What is asked of `LateDevice` is done by a thread, in order, some milliseconds later, while the host
runs on, and so are the swaps that wait behind it: as on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from mpi_dasgd.device.base import HANDLE_BYTES
from mpi_dasgd.errors import DeviceFailed

__all__ = ["LateDevice", "LateMark"]

_SHARED = Path("/dev/shm")
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class LateMark:
    """A point in the order of a device's work: see `Mark`."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._passed = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether the device has passed it."""
        self._device.check()
        return self._passed.is_set()

    def wait(self) -> None:
        """Wait until it has."""
        while not self._passed.wait(0.05):
            self._device.check()

    def pass_(self) -> None:
        """Pass it."""
        self._passed.set()


class LateDevice:
    """A device whose work is done later, by one thread: see `Device`.

    Args:
        delays: shortest and longest time from the request to the work, seconds; (0, 0): work is
            done when it is asked for, by the same code.
        seed: of the delays.

    Attributes:
        in_stream: whether this thread is inside of `current_stream`.
    """

    name = "late:0"
    is_asynchronous = True
    xp: ModuleType = np
    _regions = itertools.count()

    def __init__(self, delays: tuple[float, float] = (1e-3, 20e-3), seed: int = 0) -> None:
        self._delays = delays
        self._dice = random.Random(seed)
        self._work: deque[tuple[float, Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._closing = False
        self._streams = threading.local()
        self._thread: threading.Thread | None = None
        if max(delays) > 0:
            self._thread = threading.Thread(target=self._run, name="late device", daemon=True)
            self._thread.start()

    def submit(self, work: Callable[[], object]) -> None:
        """Have `work` done later, after all that was asked for before.

        Raises:
            DeviceFailed: the device has failed.
        """
        self.check()
        if self._thread is None:
            work()
            return
        with self._changed:
            self._work.append((time.monotonic() + self._dice.uniform(*self._delays), work))
            self._changed.notify()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """In the ``with`` block the device, if it is late at all, comes to no further work."""
        gate = threading.Event()
        if self._thread is not None:
            self.submit(gate.wait)
        try:
            yield
        finally:
            gate.set()

    def fail(self) -> None:
        """Fail: nothing that was asked for and is not done yet will be done."""
        self._failure = DeviceFailed("the late device was told to fail")

    def check(self) -> None:
        """Raise if the device has failed.

        Raises:
            DeviceFailed: it has.
        """
        if self._failure is not None:
            raise DeviceFailed(f"{self.name}: {self._failure}") from self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._work and not self._closing:
                    self._changed.wait()
                if not self._work:
                    return
                due, work = self._work[0]
            if (seconds := due - time.monotonic()) > 0:
                time.sleep(seconds)
            if self._failure is not None:
                return
            try:
                work()
            except BaseException as error:
                self._failure = error
                raise
            with self._changed:
                self._work.popleft()

    @property
    def in_stream(self) -> bool:
        return getattr(self._streams, "depth", 0) > 0

    def bind(self) -> None:
        """Do nothing."""

    @contextlib.contextmanager
    def current_stream(self) -> Iterator[None]:
        """Note that work may be asked for."""
        self._streams.depth = getattr(self._streams, "depth", 0) + 1
        try:
            yield
        finally:
            self._streams.depth -= 1

    def vector(self, tensor: torch.Tensor) -> np.ndarray:
        """Return a tensor's memory."""
        array: np.ndarray = tensor.detach().numpy()
        return array

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """Return a copy, after all work."""
        self.mark().wait()
        return array.copy()

    def assign(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy, after all work."""
        self.mark().wait()
        target[...] = source

    def allocate(self, nbytes: int) -> SharedRegion:
        """Allocate a file in /dev/shm."""
        _remove_left_over()
        path = _SHARED / f"mpi-dasgd-late-{os.getpid()}-{next(self._regions)}"
        with path.open("xb") as file:
            file.truncate(nbytes)
        return SharedRegion(path, nbytes, is_owner=True)

    def open_region(self, handle: bytes, nbytes: int) -> SharedRegion:
        """Map the file of another process.

        Raises:
            DeviceFailed: there is none.
        """
        try:
            return SharedRegion(Path(handle.rstrip(b"\0").decode()), nbytes, is_owner=False)
        except (OSError, ValueError) as error:
            raise DeviceFailed(f"{self.name}: {error}") from error

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return zeros, twice."""
        array = np.zeros(shape, dtype)
        return array, array

    def mark(self) -> LateMark:
        """Return a mark behind all work so far."""
        mark = LateMark(self)
        self.submit(mark.pass_)
        return mark

    def run_after(self, function: int, data: int) -> None:
        """Call ``function(data)`` after all work so far."""
        call = _CALL(function)
        self.submit(lambda: call(data))

    def close(self) -> None:
        """Wait until all work is done, and end the thread.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify()
            self._thread.join()
        self.check()


def _remove_left_over() -> None:
    """Remove the files of processes that were killed, or whose windows could not be freed."""
    for path in _SHARED.glob("mpi-dasgd-late-*-*"):
        try:
            os.kill(int(path.name.split("-")[3]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)


class SharedRegion:
    """Memory for slots in a file of /dev/shm: see `Region`."""

    def __init__(self, path: Path, nbytes: int, *, is_owner: bool) -> None:
        self._path, self._is_owner = path, is_owner
        with path.open("r+b") as file:
            self._map: mmap.mmap | None = mmap.mmap(file.fileno(), nbytes)
        self.array = np.frombuffer(self._map, np.uint8)

    def export(self) -> bytes:
        """Return the file's name."""
        handle = str(self._path).encode().ljust(HANDLE_BYTES, b"\0")
        assert len(handle) == HANDLE_BYTES
        return handle

    def close(self) -> None:
        """Remove the file, if it is this process's; the map goes with the last view of it."""
        if self._map is not None and self._is_owner:
            self._path.unlink(missing_ok=True)
        self._map = None
