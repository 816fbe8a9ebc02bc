"""CUDA sources as CuPy compiles them, and the launches of their kernels.

A kernel has one argument, a struct that is passed by value. Its description costs most of a launch
if it is built field by field (tens of microseconds), so it is packed into memory that is used again
for the next launch: CuPy hands its address to the driver, which copies it before it returns.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import Array

__all__ = [
    "MAX_DELTAS",
    "MIN_CAPABILITY",
    "OPTIONS",
    "POINTER",
    "THREADS",
    "Program",
    "address",
    "aligned",
    "multiprocessors",
]

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted operation is rounded differently
THREADS = 256
"""Threads per block, MPD_THREADS of ``lane.h``: 8 warps."""
MAX_DELTAS = 4
"""Deltas that one launch can absorb, or learn from: MPD_MAX_DELTAS of ``lane.h``."""
POINTER = np.uint64
"""An address in the argument of a kernel."""
MIN_CAPABILITY = (8, 0)
"""Lowest compute capability: before it a warp cannot sum in one instruction."""


class Program:
    """A CUDA source file of this package, compiled at its first use.

    Work is enqueued on CuPy's current device and stream of the calling thread.

    Args:
        file: name of the source.
        arguments: mirror of the struct that its kernels take.
        layout: the same struct for `struct.Struct`: its fields without gaps.

    Attributes:
        arguments: as given.
    """

    def __init__(self, file: str, arguments: np.dtype, layout: str) -> None:
        self._path = Path(__file__).with_name(file)
        self.arguments = arguments
        self._packed = struct.Struct(layout)
        self._memory = _Memory(arguments.itemsize)
        self._kernels: dict[tuple[str, tuple[str, ...]], Callable[..., None]] = {}

    @cached_property
    def source(self) -> str:
        """The whole source as one text, so that CuPy's disk cache notices an edited header."""
        return _with_headers(self._path)

    def launch(
        self, name: str, defines: tuple[str, ...], blocks: int, *values: float | bytes
    ) -> None:
        """Enqueue a kernel.

        Args:
            name: name of the kernel.
            defines: options of the compiler by which the source contains it.
            blocks: blocks of `THREADS` threads.
            values: all fields of its argument, in the order of the struct.

        Raises:
            UserError: the device is too old for the kernels.
        """
        memory = self._memory
        self._packed.pack_into(memory.view, 0, *values)
        kernel = self._kernels.get((name, defines)) or self._compiled(name, defines)
        kernel((blocks,), (THREADS,), memory.arguments)

    def forget(self) -> None:
        """Forget what was compiled; for tests that replace CuPy."""
        self._kernels.clear()

    def _compiled(self, name: str, defines: tuple[str, ...]) -> Callable[..., None]:
        import cupy

        module = cupy.RawModule(code=self.source, options=(*OPTIONS, *defines))
        kernel: Callable[..., None] = module.get_function(name)
        return self._kernels.setdefault((name, defines), kernel)


class _Memory(threading.local):
    """Memory of the argument of a thread's launches."""

    def __init__(self, nbytes: int) -> None:
        memory = np.zeros(nbytes, np.uint8)
        self.arguments = (memory.view(f"V{nbytes}").view(_Argument),)
        self.view = memoryview(memory)


class _Argument(np.ndarray):
    """An array of one struct, which CuPy passes by value.

    CuPy asks for its address at each launch. NumPy would describe the whole array anew each time.
    """

    def __array_finalize__(self, base: np.ndarray | None) -> None:
        self._interface = np.asarray(base).__array_interface__

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._interface


def address(array: Array | None) -> int:
    """Return the address of an array on a device, or 0."""
    return 0 if array is None else array.data.ptr


def aligned(name: str, array: Array | None, alignment: int) -> int:
    """Return the address of an array, or 0.

    Raises:
        UserError: it is not a multiple of `alignment`.
    """
    at = address(array)
    if at % alignment:
        raise UserError(
            f"{name}: expected memory aligned to {alignment} bytes, got an address that is "
            f"{at % alignment} bytes past that; make a copy"
        )
    return at


def multiprocessors() -> int:
    """Return the number of multiprocessors of CuPy's current device.

    Raises:
        UserError: the device is too old for the kernels.
    """
    import cupy

    return _multiprocessors(cupy.cuda.runtime.getDevice())


@cache
def _multiprocessors(device: int) -> int:
    import cupy

    properties: dict[str, Any] = cupy.cuda.runtime.getDeviceProperties(device)
    found = properties["major"], properties["minor"]
    if found < MIN_CAPABILITY:
        raise UserError(
            f"GPU {device} ({properties['name'].decode()}): expected compute capability "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or higher for the CUDA kernels, got "
            f"{found[0]}.{found[1]}; set transport.memory=host, which exchanges in host memory"
        )
    return int(properties["multiProcessorCount"])


def _with_headers(path: Path) -> str:
    def header(include: re.Match[str]) -> str:
        return _with_headers(path.parent / include[1])

    return re.sub(r'^#include "(.*)"$', header, path.read_text(), flags=re.MULTILINE)
