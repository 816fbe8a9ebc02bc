"""CUDA without a GPU: runtime, streams, events and memory of CuPy in host memory, and a libcuda.

All work is done when its call returns, except host functions, which a thread of the fake libcuda
runs late. Memory of devices is in files beside the libcuda, so that other processes can open it.
Every call of the runtime is kept in `calls`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch

from mpi_dasgd.device.cuda import _launch_host_function
from tests.support import fake_cupy
from tests.support.fake_cupy import FakeCupy, forget
from tests.support.mpi_ranks import ROOT, missing

NOT_READY = 600
_NAMES = {
    1: "cudaErrorInvalidValue: invalid argument",
    2: "cudaErrorMemoryAllocation: out of memory",
    208: "cudaErrorAlreadyMapped: resource already mapped",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    719: "cudaErrorLaunchFailure: unspecified launch failure",
}


class CUDARuntimeError(RuntimeError):
    """An error of the runtime, as CuPy's."""

    def __init__(self, status: int) -> None:
        super().__init__(_NAMES.get(status, f"cudaError{status}"))
        self.status = status


class CUDADriverError(RuntimeError):
    """An error of the driver, as CuPy's."""

    def __init__(self, status: int) -> None:
        super().__init__(_NAMES.get(status, "").replace("cudaErrorL", "CUDA_ERROR_L"))
        self.status = status


class DeviceArray(fake_cupy.DeviceArray):
    """A NumPy array that has of CuPy's arrays what the package uses.

    Attributes:
        sources: arrays that are copied to a device until the host waits for an event.
    """

    __module__ = "cupy"
    sources: ClassVar[list[weakref.ref[np.ndarray]]] = []

    def __new__(cls, shape: Any, dtype: Any = float, memory: Any = None) -> DeviceArray:
        """As `cupy.ndarray`: over the memory at a pointer, or of its own."""
        if memory is None:
            return np.empty(shape, dtype).view(cls)
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert nbytes <= memory.size
        bytes_at = (ctypes.c_byte * nbytes).from_address(memory.address)
        return np.ndarray.__new__(cls, shape, dtype, bytes_at)

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return np.array(self, subok=False)

    def set(self, source: np.ndarray) -> None:
        """Copy from the host; as strict as CuPy."""
        assert type(source) is np.ndarray
        if source.shape != self.shape or source.dtype != self.dtype:
            raise ValueError(f"{source.shape} {source.dtype}, not {self.shape} {self.dtype}")
        self[...] = source
        DeviceArray.sources.append(weakref.ref(source))


def build_libcuda(directory: Path) -> Path:
    """Return the fake libcuda of this process, compiled at the first call.

    There is one: another one of the same name would be loaded beside it, but never found by it.

    Args:
        directory: where the test also finds it, as a process of its own does.
    """
    library = directory / "libcuda.so.1"
    library.symlink_to(_compile_libcuda())
    return library


@cache
def _compile_libcuda() -> Path:
    if shutil.which("g++") is None:
        missing("no g++")
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    library = directory / "libcuda.so.1"
    command = ["g++", "-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC"]
    command += ["-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    source = ROOT / "tests" / "support" / "fake_cuda.cpp"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


class FakeRuntime:
    """`cupy.cuda.runtime`.

    Args:
        libcuda: the fake libcuda; loaded here, so that its name finds it afterwards.

    Attributes:
        calls: names and arguments of all calls.
        status: status of all further calls that can fail by a failed device.
        not_ready: number of queries of events that find them not done.
        free_bytes: memory that is left.
        synchronized: devices whose work was waited for.
    """

    CUDARuntimeError = CUDARuntimeError
    eventBlockingSync, eventDisableTiming = 1, 2  # noqa: N815
    hostAllocPortable, hostAllocMapped = 1, 2  # noqa: N815

    def __init__(self, libcuda: Path) -> None:
        self.libcuda = ctypes.CDLL(str(libcuda))
        self._folder = libcuda.parent
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0
        self.not_ready = 0
        self.free_bytes = 1 << 30
        self.synchronized: list[int] = []
        self._of_thread = threading.local()
        self._events_on: dict[int, int] = {}  # their devices
        self._memory: dict[int, tuple[mmap.mmap, Path | None]] = {}
        self._opened: dict[int, Path] = {}
        self._events = 0

    def fail(self, status: int) -> None:
        """Let the device fail: all further calls return `status`, and no host function runs."""
        self.status = status
        self.libcuda.fake_cuda_fail(status)

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if self.status:
            raise CUDARuntimeError(self.status)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of all calls of a function."""
        return [arguments for called, *arguments in self.calls if called == name]

    @property
    def device(self) -> int:
        """The current device of this thread."""
        return getattr(self._of_thread, "device", 0)

    @device.setter
    def device(self, index: int) -> None:
        self._of_thread.device = index

    def set_device(self, index: int) -> None:
        self._called("setDevice", index)
        self.device = index

    def getDevice(self) -> int:  # noqa: N802
        return self.device

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802
        return {"name": b"the CPU", "major": 9, "minor": 0, "multiProcessorCount": 1}

    def deviceGetPCIBusId(self, device: int) -> str:  # noqa: N802
        return f"0000:{device:02x}:00.0"

    def driverGetVersion(self) -> int:  # noqa: N802
        return 13000

    @property
    def in_use(self) -> list[int]:
        """Addresses of device memory that is allocated or open."""
        own = [address for address, (_, path) in self._memory.items() if path is not None]
        return [*own, *self._opened]

    def close(self) -> None:
        """Remove what was not freed."""
        for _, path in self._memory.values():
            if path is not None:
                path.unlink()
        self._memory.clear()

    # Memory

    def malloc(self, size: int) -> int:
        self._called("malloc", size)
        if size > self.free_bytes:
            raise CUDARuntimeError(2)
        self.free_bytes -= size
        path = self._folder / f"region.{uuid.uuid4().hex}"
        with path.open("xb") as file:
            file.truncate(size)
        return self._map(path, path)

    def _map(self, path: Path, owned: Path | None) -> int:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_byte.from_buffer(memory))
        self._memory[address] = memory, owned
        return address

    def free(self, address: int) -> None:
        self._called("free", address)
        memory, path = self._memory.pop(address)
        assert path is not None, "memory of another process is closed, not freed"
        self.free_bytes += len(memory)
        path.unlink()

    def memset(self, address: int, value: int, size: int) -> None:
        self._called("memset", address, value, size)
        ctypes.memset(address, value, size)

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.free_bytes, 1 << 30

    def hostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        self._called("hostAlloc", size, flags)
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_byte.from_buffer(memory))
        self._memory[address] = memory, None
        ctypes.memset(address, 0xA5, size)
        return address

    def ipcGetMemHandle(self, address: int) -> bytes:  # noqa: N802
        self._called("ipcGetMemHandle", address)
        path = self._memory[address][1]
        assert path is not None
        return path.name.encode().ljust(64, b"\0")

    def ipcOpenMemHandle(self, handle: bytes) -> int:  # noqa: N802
        self._called("ipcOpenMemHandle", handle)
        assert len(handle) == 64
        path = self._folder / handle.rstrip(b"\0").decode()
        if any(owned == path for _, owned in self._memory.values()) or not path.exists():
            raise CUDARuntimeError(1)
        if path in self._opened.values():
            raise CUDARuntimeError(208)
        address = self._map(path, None)
        self._opened[address] = path
        return address

    def ipcCloseMemHandle(self, address: int) -> None:  # noqa: N802
        self._called("ipcCloseMemHandle", address)
        del self._opened[address], self._memory[address]

    # Order

    def deviceSynchronize(self) -> None:  # noqa: N802
        self._called("deviceSynchronize")
        self.synchronized.append(self.device)
        self.libcuda.fake_cuda_drain()

    def eventCreateWithFlags(self, flags: int) -> int:  # noqa: N802
        self._called("eventCreateWithFlags", flags)
        self._events += 1
        self._events_on[self._events] = self.device
        return self._events

    def eventRecord(self, event: int, stream: int) -> None:  # noqa: N802
        self._called("eventRecord", event, stream)
        assert self._events_on[event] == self.device, "the default stream is of another device"

    def eventQuery(self, event: int) -> int:  # noqa: N802
        self.calls.append(("eventQuery", event))
        if self.not_ready and not self.status:
            self.not_ready -= 1
            return NOT_READY
        return self.status

    def eventSynchronize(self, event: int) -> None:  # noqa: N802
        self._called("eventSynchronize", event)
        assert all(source() is not None for source in DeviceArray.sources), "freed while copied"
        DeviceArray.sources.clear()

    def streamWaitEvent(self, stream: int, event: int) -> None:  # noqa: N802
        self._called("streamWaitEvent", stream, event)


class FakeStream:
    """`cupy.cuda.Stream`; entered and left as it is.

    Attributes:
        made: number of the newest.
        destroyed: handles of streams of other libraries whose objects were deleted.
    """

    made = 1000
    destroyed: ClassVar[list[int]] = []
    runtime: FakeRuntime

    def __init__(self, *, non_blocking: bool = False) -> None:
        self.is_non_blocking = non_blocking
        self.device = self.runtime.device
        FakeStream.made += 1
        self.ptr = FakeStream.made

    @classmethod
    def from_external(cls, stream: Any) -> FakeStream:
        """The stream of another library."""
        version, handle = stream.__cuda_stream__()
        assert version == 0
        made = cls()
        made.ptr = handle
        weakref.finalize(made, cls.destroyed.append, handle)  # as CuPy 14.0
        return made

    current: ClassVar[list[FakeStream]] = []

    def __enter__(self) -> FakeStream:
        assert self.device == self.runtime.device, "a stream of another device"
        FakeStream.current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert FakeStream.current.pop() is self


class FakeDevice:
    """`cupy.cuda.Device`, and `torch.cuda.device`."""

    def __init__(self, runtime: FakeRuntime, index: int) -> None:
        self.id = index
        self._runtime = runtime
        self._before: list[int] = []

    def use(self) -> None:
        """Make it the current device of this thread."""
        self._runtime.set_device(self.id)

    def __enter__(self) -> FakeDevice:
        self._before.append(self._runtime.device)
        self._runtime.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.device = self._before.pop()


class FakeCuda:
    """The module `cupy`: what it does not have is NumPy's.

    Args:
        libcuda: the fake libcuda.
        kernels: kernels that were compiled for the CPU (`tests.support.cuda_build`); None: none.

    Attributes:
        runtime: its `cuda.runtime`.
        stream: handle of torch's current stream.
        is_capturing: whether it is being captured.
        emptied: how often CuPy was told to give back memory that it does not use.
        kept_bytes: how much of it there is.
    """

    __version__ = "14.2.0"
    ndarray = DeviceArray

    def __init__(self, libcuda: Path, kernels: Path | None = None) -> None:
        self.runtime = FakeRuntime(libcuda)
        if kernels is not None:
            self.shim = FakeCupy(kernels)
            self.RawModule = self.shim.RawModule
        self.stream, self.is_capturing, self.emptied, self.kept_bytes = 77, False, 0, 0
        self.cuda = SimpleNamespace(
            runtime=self.runtime,
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            Stream=type("Stream", (FakeStream,), {"runtime": self.runtime}),
            Device=self._device,
            get_current_stream=lambda: FakeStream.current[-1],
            UnownedMemory=lambda address, size, owner, device: SimpleNamespace(
                address=address, size=size, owner=owner, device=device
            ),
            MemoryPointer=lambda memory, offset: SimpleNamespace(
                address=memory.address + offset, size=memory.size - offset
            ),
        )

    def _device(self, index: int | None = None) -> FakeDevice:
        return FakeDevice(self.runtime, self.runtime.device if index is None else index)

    def _forget_free_memory(self) -> None:
        self.emptied += 1
        self.runtime.free_bytes += self.kept_bytes
        self.kept_bytes = 0

    def get_default_memory_pool(self) -> Any:
        """CuPy's pool."""
        return SimpleNamespace(free_all_blocks=self._forget_free_memory)

    def from_dlpack(self, tensor: torch.Tensor) -> DeviceArray:
        """The memory of a tensor; CuPy's current stream must be torch's."""
        assert FakeStream.current[-1].ptr == self.stream
        return tensor.numpy().view(DeviceArray)

    def asarray(self, array: np.ndarray) -> DeviceArray:
        """A copy on the device."""
        return np.array(array).view(DeviceArray)

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if not callable(found) or isinstance(found, type):
            return found

        def on_device(*arguments: Any, **keywords: Any) -> Any:
            result = found(*arguments, **keywords)
            return result.view(DeviceArray) if isinstance(result, np.ndarray) else result

        return on_device

    def of_torch(self) -> dict[str, Any]:
        """Functions of `torch.cuda` as they are with this GPU."""
        return {
            "device": self._device,
            "set_device": lambda index: self.runtime.calls.append(("torch.set_device", index)),
            "current_stream": lambda device=None: SimpleNamespace(cuda_stream=self.stream),
            "is_current_stream_capturing": lambda: self.is_capturing,
            "empty_cache": lambda: self.runtime.calls.append(("torch.empty_cache",)),
            "current_device": lambda: self.runtime.device,
            "device_count": lambda: 1,
            "is_available": lambda: True,
            "get_device_name": lambda index: "the CPU",
            "get_device_capability": lambda index: (9, 0),
            "get_device_properties": lambda index: SimpleNamespace(uuid=f"uuid-{index}"),
        }

    @contextlib.contextmanager
    def installed(self) -> Iterator[FakeCuda]:
        """In the ``with`` block, it is `cupy`, and torch has a GPU."""
        _launch_host_function.cache_clear()
        forget()
        before = sys.modules.get("cupy")
        sys.modules["cupy"] = self  # type: ignore[assignment]
        try:
            with mock.patch.multiple(torch.cuda, **self.of_torch()):
                yield self
        finally:
            del sys.modules["cupy"]
            if before is not None:
                sys.modules["cupy"] = before
        self.runtime.close()
