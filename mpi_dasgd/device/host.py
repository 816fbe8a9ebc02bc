"""The host as a device: NumPy, with all work done when its call returns."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.device.base import Device, Mark, Region

if TYPE_CHECKING:  # the simulator does without
    import torch

__all__ = ["HOST", "HostDevice"]


class _Done:
    """A mark that is passed."""

    is_done = True

    def wait(self) -> None:
        """Return at once."""


_DONE = _Done()


class HostDevice:
    """The host; see `Device`."""

    name = "cpu"
    is_asynchronous = False
    xp: ModuleType = np

    def bind(self) -> None:
        """Do nothing."""

    @contextmanager
    def current_stream(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def vector(self, tensor: torch.Tensor) -> np.ndarray:
        """Return `tensor`, (elements,), as an array over the same memory."""
        array: np.ndarray = tensor.detach().numpy()
        return array

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """Return `array`."""
        return array

    def assign(self, target: np.ndarray, source: np.ndarray) -> None:
        """Copy `source` to `target`."""
        target[...] = source

    def allocate(self, nbytes: int) -> Region:
        """Raise: slots in host memory are in windows of MPI.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("slots in host memory are in windows of MPI")

    def open_region(self, handle: bytes, nbytes: int) -> Region:
        """Raise; see `allocate`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("slots in host memory are in windows of MPI")

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return zeros, twice."""
        array = np.zeros(shape, dtype)
        return array, array

    def mark(self) -> Mark:
        """Return a mark that is passed."""
        return _DONE

    def run_after(self, function: int, data: int) -> None:
        """Run ``function(data)`` at once."""
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)

    def close(self) -> None:
        """Do nothing."""


HOST: Device = HostDevice()
"""The host; it has no state."""
