"""Fused pair averaging of unquantized models: absorb deltas, average, write reply and publication.

The native library does it in one pass over memory; without it NumPy does the same in cache-sized
blocks. Both give the same bits: every operation is rounded once, in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native, optimizer_reference
from mpi_dasgd.kernels.encoded import CACHE_BLOCK
from mpi_dasgd.kernels.optimizer_native import optimizer_struct
from mpi_dasgd.kernels.optimizer_step import OptimizerStep

__all__ = ["pair_average", "pair_average_numpy"]


def pair_average(
    x: np.ndarray,
    deltas: Sequence[np.ndarray] = (),
    partner_model: np.ndarray | None = None,
    weight: float = 0.5,
    reply_delta: np.ndarray | None = None,
    publication: np.ndarray | None = None,
    update: OptimizerStep | None = None,
    threads: int = 1,
) -> None:
    """Average `x` with a partner's model and write both results of the exchange::

        x += sum(deltas)
        d = weight * (partner_model - x)
        x += d;  reply_delta = -d;  publication = x

    Both sides of an exchange move by exactly the same amounts, so that the sum of all models is
    conserved up to the rounding of the additions (pair exchange of AD-PSGD, Lian et al. 2018).

    Args:
        x: own model, 1-D float32 or float64, contiguous; changed in place.
        deltas: deltas to absorb first, in this order; shape and dtype of `x`.
        partner_model: the model that the partner published, or None without a partner.
        weight: share of the distance to move.
        reply_delta: receives ``-d``, or None.
        publication: receives the new `x`, or None.
        update: step of an optimizer on a float32 model, made before all else, or None.
        threads: number of threads that share a float32 model; the result does not depend on it.

    Raises:
        UserError: there is an update, and the model is not float32.
    """
    run = _native(x.dtype.char)
    if update is not None and x.dtype != np.float32:
        raise UserError(f"update: expected a model of float32, got {x.dtype}")
    if run is None:
        pair_average_numpy(x, deltas, partner_model, weight, reply_delta, publication, update)
        return
    last = (optimizer_struct(update), threads) if x.dtype == np.float32 else ()
    run(
        _address(x),
        x.size,
        (ctypes.c_void_p * len(deltas))(*map(_address, deltas)),
        len(deltas),
        _address(partner_model),
        weight,
        _address(reply_delta),
        _address(publication),
        *last,
    )


def _address(array: np.ndarray | None) -> int | None:
    """Return the address of an array's memory; ``array.ctypes.data`` creates an object per call."""
    return None if array is None else array.__array_interface__["data"][0]


@cache
def _native(char: str) -> Callable[..., None] | None:
    library = native.load()
    if library is None:
        return None
    function = {"f": library.mpd_pair_average_f32, "d": library.mpd_pair_average_f64}[char]
    pointer = ctypes.c_void_p
    function.argtypes = [
        pointer, ctypes.c_int64, pointer, ctypes.c_int, pointer, ctypes.c_double, pointer, pointer,
        *((pointer, ctypes.c_int) if char == "f" else ()),
    ]  # fmt: skip
    function.restype = None
    return function


def pair_average_numpy(
    x: np.ndarray,
    deltas: Sequence[np.ndarray] = (),
    partner_model: np.ndarray | None = None,
    weight: float = 0.5,
    reply_delta: np.ndarray | None = None,
    publication: np.ndarray | None = None,
    update: OptimizerStep | None = None,
) -> None:
    """Do what `pair_average` does, in NumPy: test oracle, and fallback without a compiler."""
    scale = x.dtype.type(weight)
    for start in range(0, x.size, CACHE_BLOCK):
        part = slice(start, start + CACHE_BLOCK)
        v = x[part]
        if update is not None:
            optimizer_reference.update(update, v, start)
        for delta in deltas:
            v += delta[part]
        if partner_model is not None:
            d = partner_model[part] - v
            d *= scale
            v += d
            if reply_delta is not None:
                np.negative(d, out=reply_delta[part])
        if publication is not None:
            publication[part] = v
