"""Whether a vector is finite, as every step of a rank asks before others see its model.

In a step of 2 ms the time is that of code and data which are in no cache: with all prepared, the
native function takes 4 us for 10,000 elements. `numpy.dot` takes 14 then, and `torch.dot` 16; so
does NumPy to tell where an array is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from mpi_dasgd.kernels import native

__all__ = ["all_finite_numpy", "prepare_all_finite"]

_LARGE = 1 << 20  # elements, above which BLAS, with its threads, is as fast or faster


def prepare_all_finite(x: np.ndarray) -> Callable[[], bool]:
    """Return a function that tells whether no element of `x` is infinite or NaN at present.

    Args:
        x: 1-D float32 or float64, contiguous.
    """
    name = {"f": "mpd_all_finite_f32", "d": "mpd_all_finite_f64"}[x.dtype.char]
    run = getattr(native.load(), name, None)  # a library of older sources has none
    if run is None or x.size > _LARGE:
        return lambda: all_finite_numpy(x)
    run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    address = x.ctypes.data
    return lambda: run(address, x.size) != 0


def all_finite_numpy(x: np.ndarray) -> bool:
    """Return whether no element of `x` is infinite or NaN.

    By NumPy: for large vectors, and without a compiler.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        # The sum of squares is one pass at the speed of memory; only a large one needs a second.
        return bool(np.isfinite(np.dot(x, x)) or np.isfinite(x).all())
