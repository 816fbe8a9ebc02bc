"""Absorb deltas, average with a partner, write reply and publication: one pass over the model.

The native library does it in one pass over memory; without it NumPy does the same in cache-sized
blocks. Both give the same bits: every operation is rounded once, in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from mpi_dasgd.kernels import native
from mpi_dasgd.kernels.encoded import CACHE_BLOCK

__all__ = ["pair_average", "pair_average_numpy"]


def pair_average(
    x: np.ndarray,
    arrived: Sequence[np.ndarray] = (),
    theirs: np.ndarray | None = None,
    weight: float = 0.5,
    reply: np.ndarray | None = None,
    published: np.ndarray | None = None,
) -> None:
    """Do ``x += sum(arrived)``, ``d = weight * (theirs - x)``, ``x += d``, ``reply = -d``, ``published = x``.

    Args:
        x: own model, 1-D float32 or float64, contiguous; changed in place.
        arrived: deltas to absorb first, in this order; shape and type of `x`.
        theirs: the partner's published model, or None if there is no partner.
        weight: share of the distance to move.
        reply: receives ``-d``, or None.
        published: receives the new `x`, or None.

    Both sides of an exchange move by exactly the same amounts, so that the sum of all models is
    conserved to the rounding of the additions (design of the pair exchange; AD-PSGD, Lian et al. 2018).
    """
    run = _native(x.dtype.char)
    if run is None:
        pair_average_numpy(x, arrived, theirs, weight, reply, published)
        return
    run(
        _address(x),
        x.size,
        (ctypes.c_void_p * len(arrived))(*map(_address, arrived)),
        len(arrived),
        _address(theirs),
        weight,
        _address(reply),
        _address(published),
    )


def _address(array: np.ndarray | None) -> int | None:
    """Where an array lies; ``array.ctypes.data`` would make an object for each call."""
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
    ]  # fmt: skip
    function.restype = None
    return function


def pair_average_numpy(
    x: np.ndarray,
    arrived: Sequence[np.ndarray] = (),
    theirs: np.ndarray | None = None,
    weight: float = 0.5,
    reply: np.ndarray | None = None,
    published: np.ndarray | None = None,
) -> None:
    """NumPy twin of `pair_average`: the oracle of its tests and what runs without a compiler."""
    scale = x.dtype.type(weight)
    for start in range(0, x.size, CACHE_BLOCK):
        part = slice(start, start + CACHE_BLOCK)
        v = x[part]
        for delta in arrived:
            v += delta[part]
        if theirs is not None:
            d = theirs[part] - v
            d *= scale
            v += d
            if reply is not None:
                np.negative(d, out=reply[part])
        if published is not None:
            published[part] = v
