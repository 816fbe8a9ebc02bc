"""CuPy on the CPU, as far as the package uses it: arrays are NumPy's, kernels run in the shim."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpi_dasgd.kernels import cuda
from mpi_dasgd.kernels.cuda import optimizer, pair_average, program, scale, table

__all__ = ["PROGRAMS", "DeviceArray", "FakeCupy", "forget", "install", "installed"]

PROGRAMS = (
    cuda.LATTICE, scale.SCALE, pair_average.AVERAGE, optimizer.OPTIMIZER, table.TABLE
)  # fmt: skip
"""All CUDA sources."""

ARGUMENTS = r"^struct (Mpd\w+Arguments) \{"


class DeviceArray(np.ndarray):
    """A NumPy array that gives its address as CuPy's arrays do, and is taken for one of them."""

    __module__ = "cupy"

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])


class FakeCupy:
    """The part of CuPy that `mpi_dasgd.kernels.cuda` uses, on the CPU.

    Args:
        library: kernels that were compiled for the CPU (`tests.support.cuda_build`).

    Attributes:
        shape: grid and block of all launches; None: as requested.
        launched: names of the kernels that were launched, in order.
        arguments: their arguments.
        properties: those of the only device.
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.shape: tuple[int, int] | None = None
        self.launched: list[str] = []
        self.arguments: list[bytes] = []
        self.properties: dict[str, Any] = {
            "name": b"the CPU", "major": 9, "minor": 0, "multiProcessorCount": 1,
        }  # fmt: skip
        runtime = SimpleNamespace(
            getDevice=lambda: 0, getDeviceProperties=lambda device: self.properties
        )
        stream = SimpleNamespace(ptr=0)
        self.cuda = SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream)

    def zeros(self, shape: Any, dtype: Any) -> DeviceArray:
        return np.zeros(shape, dtype).view(DeviceArray)

    empty = zeros

    def asarray(self, array: np.ndarray) -> DeviceArray:
        return array.copy().view(DeviceArray)

    def RawModule(self, code: str, options: tuple[str, ...]) -> SimpleNamespace:  # noqa: N802
        assert "--fmad=false" in options
        assert '#include "' not in code
        launch = getattr(self.library, f"launch_{re.findall(ARGUMENTS, code, re.MULTILINE)[-1]}")
        return SimpleNamespace(get_function=partial(self._function, launch))

    def _function(self, launch: Any, name: str) -> Callable[..., None]:
        kernel = getattr(self.library, name)

        def function(grid: tuple[int], block: tuple[int], args: tuple[np.ndarray]) -> None:
            (argument,) = args
            assert argument.size == 1
            at, nbytes = argument.__array_interface__["data"][0], argument.nbytes
            self.launched.append(name)
            self.arguments.append(argument.tobytes())
            shape = self.shape or (*grid, *block)
            failed = launch(kernel, ctypes.c_void_p(at), ctypes.c_size_t(nbytes), *shape)
            assert not failed, f"{name}: its argument has not {nbytes} bytes"

        return function


@contextmanager
def installed(fake: FakeCupy) -> Iterator[None]:
    """Replace CuPy by `fake` in the ``with`` block."""
    before = sys.modules.get("cupy")
    install(fake)
    try:
        yield
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before
        forget()


def install(fake: FakeCupy) -> None:
    """Replace CuPy by `fake`."""
    sys.modules["cupy"] = fake  # type: ignore[assignment]
    forget()


def forget() -> None:
    """Let go of the kernels of another CuPy."""
    for kernels in PROGRAMS:
        kernels.forget()
    program._multiprocessors.cache_clear()
    pair_average._partial_of.cache_clear()
