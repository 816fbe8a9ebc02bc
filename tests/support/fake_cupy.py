"""CuPy on the CPU, as far as the package uses it: arrays are NumPy's, kernels run in the shim."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpi_dasgd.kernels import cuda

__all__ = ["DeviceArray", "FakeCupy", "install"]


class DeviceArray(np.ndarray):
    """A NumPy array that gives its address as CuPy's arrays do."""

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
    """

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.shape: tuple[int, int] | None = None
        self.launched: list[str] = []
        device = SimpleNamespace(attributes={"MultiProcessorCount": 1})
        self.cuda = SimpleNamespace(Device=lambda: device)

    def RawModule(self, code: str, options: tuple[str, ...]) -> FakeCupy:  # noqa: N802
        assert "--fmad=false" in options
        assert '#include "' not in code
        return self

    def get_function(self, name: str) -> Callable[..., None]:
        kernel = getattr(self.library, name)

        def launch(grid: tuple[int], block: tuple[int], args: tuple[np.ndarray]) -> None:
            (arguments,) = args
            assert arguments.nbytes == cuda.KERNEL_ARGUMENTS.itemsize
            self.launched.append(name)
            shape = self.shape or (*grid, *block)
            self.library.mpd_launch(kernel, ctypes.c_void_p(arguments.ctypes.data), *shape)

        return launch


def install(fake: FakeCupy) -> None:
    """Replace CuPy by `fake`."""
    sys.modules["cupy"] = fake  # type: ignore[assignment]
    cuda._kernel.cache_clear()
    cuda._module.cache_clear()
