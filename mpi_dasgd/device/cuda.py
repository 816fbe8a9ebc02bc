"""An NVIDIA GPU as a device: CuPy's arrays in torch's memory, and the order of torch's stream.

CuPy is imported in functions only, and not before a GPU is used. Torch and CuPy have a CUDA runtime
each; what both must know, as the current device, is told to both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mpi_dasgd.device.base import Array, Mark, Region
from mpi_dasgd.device.cuda_calls import CudaCalls
from mpi_dasgd.device.cuda_events import CudaEvents
from mpi_dasgd.device.cuda_memory import CudaMemory
from mpi_dasgd.errors import DeviceFailed, UserError

__all__ = ["CudaDevice"]

# cudaStreamLegacy, torch's default stream, which torch calls 0. CuPy takes 0 for that of the thread
# if CUPY_CUDA_PER_THREAD_DEFAULT_STREAM is set.
_DEFAULT_STREAM = 1

# CuPy's streams by module, device and handle of torch. They are kept as long as the process: CuPy
# 14.0 destroys the stream itself, torch's, when its object is deleted.
_streams: dict[tuple[ModuleType, int, int], Any] = {}


class CudaDevice:
    """A GPU; see `Device`.

    Args:
        index: its number among those that this process sees.

    Raises:
        ImportError: CuPy is not installed.
        DeviceFailed: the GPU cannot be used.

    Attributes:
        name: its name in torch's notation.
        xp: CuPy.
    """

    is_asynchronous = True

    def __init__(self, index: int) -> None:
        import cupy

        self.name = f"cuda:{index}"
        self.xp: ModuleType = cupy
        self._index = index
        self._calls = CudaCalls(cupy, self.name)
        self._events = CudaEvents(self._calls)
        self._memory = CudaMemory(cupy, self._calls, index)
        self._newest: int | None = None  # the stream of the newest work
        self.bind()
        with self._calls.checked("creating a stream"):
            # A blocking one would wait for torch's default stream, and that for it.
            self._side = cupy.cuda.Stream(non_blocking=True)
        self._launch_host_function = _launch_host_function()

    def bind(self) -> None:
        """Make it the device of the calling thread, for torch and for CuPy.

        Raises:
            DeviceFailed: the device has failed.
        """
        with self._calls.checked("choosing the device"):
            torch.cuda.set_device(self._index)
            self.xp.cuda.Device(self._index).use()

    @contextmanager
    def current_stream(self) -> Iterator[None]:
        """In the ``with`` block, work of CuPy joins torch's current stream of this thread.

        It comes behind the work of earlier blocks, on whatever stream that was.

        Raises:
            UserError: that stream is being captured into a graph.
            DeviceFailed: the device has failed, in the block or before.
        """
        with self._calls.checked("work on the device"), self._current():
            if torch.cuda.is_current_stream_capturing():
                raise UserError(
                    "the current stream is being captured into a CUDA graph, of which an exchange "
                    "cannot be a part: capture forward and backward if you like, after the model "
                    "was wrapped, and call step() outside of the graph"
                )
            handle = self._torch_stream()
            if handle != self._newest:
                self._go_on_with(handle)
            with self._stream(handle):
                yield

    def _go_on_with(self, handle: int) -> None:
        """Have work on stream `handle` come behind what was asked for on another one.

        A loop on a stream of the user's may be followed by `close` on the default one: the user
        knows of no work there that would have to wait.
        """
        if self._newest is not None:
            mark = self._events.mark(self._newest)
            self._calls.runtime.streamWaitEvent(handle, mark.event)
        self._newest = handle

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make it the current device in the ``with`` block.

        A thread begins with device 0, and the program may have chosen another one. Launches, events
        and the default stream would be those of that one.
        """
        index, runtime = self._index, self._calls.runtime
        if torch.cuda.current_device() == index == runtime.getDevice():
            yield
        else:
            with torch.cuda.device(index), self.xp.cuda.Device(index):
                yield

    def _stream(self, handle: int) -> Any:
        """Return CuPy's stream for a handle; torch has a few, in a pool, and destroys none."""
        key = self.xp, self._index, handle
        stream = _streams.get(key)
        if stream is None:
            stream = self.xp.cuda.Stream.from_external(_TorchStream(handle or _DEFAULT_STREAM))
            _streams[key] = stream
        return stream

    def _torch_stream(self) -> int:
        """Return the handle of torch's current stream of this thread."""
        return int(torch.cuda.current_stream(self._index).cuda_stream)

    def vector(self, tensor: torch.Tensor) -> Array:
        """Return `tensor`, (elements,), as an array of CuPy over the same memory.

        Raises:
            ValueError: it is not a contiguous vector on this device.
        """
        tensor = tensor.detach()
        if tensor.ndim != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"a contiguous vector is needed, not a tensor of shape {tuple(tensor.shape)} and "
                f"strides {tensor.stride()}"
            )
        with self.current_stream():
            array = self.xp.from_dlpack(tensor)
        if array.size and array.data.ptr != tensor.data_ptr():
            raise ValueError(f"the tensor is on {tensor.device}, not on {self.name}")
        return array

    def to_host(self, array: Array) -> np.ndarray:
        """Return a copy of `array` in host memory. Waits.

        Raises:
            DeviceFailed: the device has failed.
        """
        with self.current_stream():
            copy: np.ndarray = array.get()
        return copy

    def assign(self, target: Array, source: np.ndarray) -> None:
        """Copy `source`, in host memory, to `target`. Waits.

        Raises:
            DeviceFailed: the device has failed.
        """
        source = np.ascontiguousarray(source, target.dtype)
        with self.current_stream():
            target.set(source)
            self.mark().wait()  # the source may change, or be freed, now

    def allocate(self, nbytes: int) -> Region:
        """Allocate memory for payload slots, filled with zeros.

        Raises:
            UserError: there is not enough; says how much was wanted.
            DeviceFailed: the device has failed.
        """
        return self._memory.allocate(nbytes)

    def open_region(self, handle: bytes, nbytes: int) -> Region:
        """Open a region that another process of the node has exported.

        Raises:
            DeviceFailed: it cannot be opened.
        """
        return self._memory.open_region(handle, nbytes)

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Array, np.ndarray]:
        """Allocate zeros that the device writes and the host reads.

        Returns:
            The memory as the device sees it, and as the host sees it.

        Raises:
            DeviceFailed: the device has failed.
        """
        return self._memory.mapped(shape, dtype)

    def mark(self) -> Mark:
        """Return a mark behind all work that was asked for so far on torch's current stream.

        Raises:
            DeviceFailed: the device has failed.
        """
        return self._events.mark(self._torch_stream())

    def run_after(self, function: int, data: int) -> None:
        """Run ``function(data)``, native code, when all work asked for so far is done.

        It runs in a thread of the driver, in the order of the calls, and never if the device fails
        before.

        Args:
            function: address of a ``void (*)(void*)``.
            data: its argument, an address that stays valid until it has run.

        Raises:
            DeviceFailed: the device has failed.
        """
        mark = self._events.mark(self._torch_stream())
        with self._calls.checked("waiting for an event"):
            self._calls.runtime.streamWaitEvent(self._side.ptr, mark.event)
        status = self._launch_host_function(self._side.ptr, function, data)
        self._calls.require_driver_success("launching a host function", status)

    def close(self) -> None:
        """Wait until all work is done.

        Raises:
            DeviceFailed: the device has failed.
        """
        with self._calls.checked("the work on the device"), self._current():
            self._calls.runtime.deviceSynchronize()


class _TorchStream:
    """A stream of torch in CUDA's stream protocol, which not all versions of torch speak."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@cache
def _launch_host_function() -> Callable[[int, int, int], int]:
    """Return ``cuLaunchHostFunc(stream, function, data)`` of the driver.

    That of CuPy calls Python, which needs the GIL: it deadlocks with a thread that holds the GIL
    and waits for the device.

    Raises:
        DeviceFailed: there is no driver.
    """
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
    except (OSError, AttributeError) as error:
        raise DeviceFailed(f"the CUDA driver cannot be used: {error}") from error
    function.argtypes = [ctypes.c_void_p] * 3  # otherwise an address is cut to 32 bits
    function.restype = ctypes.c_int
    bound: Callable[[int, int, int], int] = function
    return bound
