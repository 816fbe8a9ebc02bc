"""A device whose kernels run in the shim, and whose marks are passed late: for codecs on a GPU.

Kernels are done when they are launched, but the host sees what they wrote to mapped memory only
when a mark behind them is passed: some looks later, in order. Arrays may only be used by kernels
while they are guarded, so that nothing is computed by the array module, or read by the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.support.fake_cupy import DeviceArray, FakeCupy

__all__ = ["GuardedArray", "LateCudaDevice", "LateCupy"]

ALIGNMENT = 256  # of CUDA's allocations


class GuardedArray(DeviceArray):
    """An array that refuses to be used by anything but kernels and views, while it is guarded."""

    __module__ = "cupy"
    is_guarded = False

    @classmethod
    @contextlib.contextmanager
    def guarded(cls) -> Iterator[None]:
        """Refuse in the ``with`` block."""
        cls.is_guarded = True
        try:
            yield
        finally:
            cls.is_guarded = False

    @classmethod
    def _refuse(cls) -> None:
        assert not cls.is_guarded, "an array of the device is used outside of kernels"

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        self._refuse()
        plain = [i.view(np.ndarray) if isinstance(i, GuardedArray) else i for i in inputs]
        if "out" in options:
            options["out"] = tuple(o.view(np.ndarray) for o in options["out"])
        result = getattr(ufunc, method)(*plain, **options)
        return result.view(GuardedArray) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self._refuse()
        return super().__array_function__(function, types, args, kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._refuse()
        super().__setitem__(key, value)

    def __float__(self) -> float:
        self._refuse()
        return float(self.view(np.ndarray))


def _refused(name: str) -> Any:
    def method(self: GuardedArray, *args: Any, **kwargs: Any) -> Any:
        self._refuse()
        return getattr(DeviceArray, name)(self, *args, **kwargs)

    return method


for _name in ("astype", "copy", "tobytes", "tolist", "any", "all", "sum", "max", "min", "fill"):
    setattr(GuardedArray, _name, _refused(_name))


def allocate(nbytes: int) -> GuardedArray:
    """Return zeros as CUDA's allocations are aligned."""
    memory = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes].view(GuardedArray)


class LateCupy(FakeCupy):
    """`FakeCupy` with arrays that are guarded.

    Attributes:
        allocations: number of arrays made.
    """

    allocations = 0

    def zeros(self, shape: Any, dtype: Any = float) -> GuardedArray:
        """Zeros."""
        self.allocations += 1
        dtype, shape = np.dtype(dtype), np.atleast_1d(shape)
        flat = allocate(int(np.prod(shape)) * dtype.itemsize).view(dtype)
        return flat.reshape(shape)

    empty = zeros


class LateMark:
    """A point in the order of the work of a `LateCudaDevice`."""

    def __init__(self, device: LateCudaDevice, index: int) -> None:
        self._device, self._index = device, index

    @property
    def is_done(self) -> bool:
        """Whether it is passed."""
        self._device.look()
        return self._device.passed >= self._index

    def wait(self) -> None:
        """Pass it."""
        self._device.waits += 1
        self._device.pass_to(self._index)


class LateCudaDevice:
    """See the module; a `Device`.

    Args:
        cupy: the fake CuPy.
        seed: of the delays.
        pace: probability that a look at a mark finds more of them passed; 0: only waiting does.

    Attributes:
        passed: index of the last mark that is passed.
        copies: arrays that were copied between host and device.
        waits: number of waits for a mark.
    """

    name = "cuda:0"
    is_asynchronous = True

    def __init__(self, cupy: LateCupy, seed: int = 0, pace: float = 0.5) -> None:
        self.xp: Any = cupy
        self.passed = 0
        self.copies = 0
        self.waits = 0
        self._rng, self._pace = np.random.default_rng(seed), pace
        self._mapped: list[tuple[np.ndarray, np.ndarray]] = []
        self._written: list[list[np.ndarray]] = [[]]  # what mapped memory holds at each mark

    @contextlib.contextmanager
    def current_stream(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def to_host(self, array: Any) -> np.ndarray:
        """Copy to the host."""
        self.copies += 1
        return np.array(array.view(np.ndarray))

    def assign(self, target: Any, source: np.ndarray) -> None:
        """Copy to the device."""
        self.copies += 1
        target.view(np.ndarray)[...] = source

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Any, np.ndarray]:
        """Return memory that the host sees late, and NaN before."""
        on_device = self.xp.zeros(shape, dtype)
        on_host = np.full(shape, np.nan, dtype)
        self._mapped.append((on_device.view(np.ndarray), on_host))
        return on_device, on_host

    def mark(self) -> LateMark:
        """Return a mark behind all work so far."""
        self._written.append([on_device.copy() for on_device, _ in self._mapped])
        return LateMark(self, len(self._written) - 1)

    def look(self) -> None:
        """Pass some marks, or none."""
        if self._rng.random() < self._pace:
            self.pass_to(min(self.passed + self._rng.integers(1, 5), len(self._written) - 1))

    def pass_to(self, index: int) -> None:
        """Pass all marks to this one."""
        if index > self.passed:
            self.passed = index
            for (_, on_host), written in zip(self._mapped, self._written[index], strict=False):
                on_host[...] = written
