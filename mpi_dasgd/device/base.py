"""A device as the rest of the package sees it: memory, order of work, and what is behind.

On the host all work is done when its call returns. On a GPU it is only asked for: it is done in the
order of a stream, and whoever gives memory away must wait until the device has passed the point
where the work was asked for (`mpi_dasgd.transport.release`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # the simulator does without
    import torch

__all__ = ["HANDLE_BYTES", "Array", "Device", "Mark", "Region"]

Array = Any  # NumPy or CuPy

HANDLE_BYTES = 64
"""Length of an exported region's handle, that of CUDA's."""


class Mark(Protocol):
    """A point in the order of a device's work."""

    @property
    def is_done(self) -> bool:
        """Whether the device has passed it. Never waits.

        Raises:
            DeviceFailed: the device has failed, and will not pass it.
        """

    def wait(self) -> None:
        """Wait until the device has passed it, without the GIL.

        Raises:
            DeviceFailed: the device has failed.
        """


class Region(Protocol):
    """Memory of a device for payload slots: an allocation of its own.

    Attributes:
        array: the memory, uint8, (nbytes,).
    """

    array: Array

    def export(self) -> bytes:
        """Return a handle, `HANDLE_BYTES` bytes, by which other processes of the node open it."""

    def close(self) -> None:
        """Free it, or close it where another process has allocated it; once all work is done."""


class Device(Protocol):
    """Where a rank's model is.

    Attributes:
        name: name in torch's notation, as in ``cuda:0``.
        is_asynchronous: whether work is only asked for; otherwise marks are done at once.
        xp: array module of its arrays: NumPy or CuPy.
    """

    name: str
    is_asynchronous: bool
    xp: ModuleType

    def bind(self) -> None:
        """Make it the device of the calling thread, for torch and for `xp`."""

    def current_stream(self) -> AbstractContextManager[None]:
        """In the ``with`` block, work of `xp` joins torch's current stream of this thread.

        It comes behind the work of earlier blocks, on whatever stream that was.

        Raises:
            UserError: that stream is being captured into a graph.
        """

    def vector(self, tensor: torch.Tensor) -> Array:
        """Return `tensor`, (elements,), as an array of `xp` over the same memory."""

    def to_host(self, array: Array) -> np.ndarray:
        """Return a copy of `array` in host memory; on the host `array` itself. Waits."""

    def assign(self, target: Array, source: np.ndarray) -> None:
        """Copy `source`, in host memory, to `target`. Waits."""

    def allocate(self, nbytes: int) -> Region:
        """Allocate memory for payload slots, filled with zeros.

        Raises:
            UserError: there is not enough; says how much was wanted.
        """

    def open_region(self, handle: bytes, nbytes: int) -> Region:
        """Open a region that another process of the node has exported.

        Raises:
            DeviceFailed: it cannot be opened.
        """

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Array, np.ndarray]:
        """Allocate zeros that the device writes and the host reads.

        Returns:
            The memory as the device sees it, and as the host sees it.
        """

    def mark(self) -> Mark:
        """Return a mark behind all work that was asked for so far on torch's current stream."""

    def run_after(self, function: int, data: int) -> None:
        """Run ``function(data)``, native code, when all work asked for so far is done.

        It runs in another thread, without the GIL, in the order of the calls, and never if the
        device fails before. It must not call the device.

        Args:
            function: address of a ``void (*)(void*)``.
            data: its argument, an address that stays valid until it has run.

        Raises:
            DeviceFailed: the device has failed.
        """

    def close(self) -> None:
        """Wait until all work is done."""
