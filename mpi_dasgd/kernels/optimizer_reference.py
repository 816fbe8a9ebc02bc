"""A step of an optimizer in NumPy: oracle of all other backends, and fallback without a compiler.

Every line is the same rounded operation as in ``optimizer_math.h``; the results agree bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpi_dasgd.kernels.optimizer_step import (
    AMSGRAD,
    DECAY,
    DECOUPLED,
    FACTOR,
    FIRST,
    MAXIMIZE,
    MOMENTUM,
    NESTEROV,
    SGD,
    TAIL,
    TORCH_VECTOR,
    OptimizerStep,
)

__all__ = ["fma", "update"]

_F32 = np.float32


def update(step: OptimizerStep, x: np.ndarray, begin: int = 0) -> None:
    """Make a step on a part of a model, and set `step.nonfinite` if it is not finite then.

    Args:
        step: step of the whole model.
        x: the part, float32, 1-D; changed in place.
        begin: index of its first element in the model.
    """
    with np.errstate(all="ignore"):  # a diverging model is no reason to warn: the caller is told
        for group, flags, part, gradient in _parts(step, begin, begin + x.size):
            make = _sgd if group["kind"] == SGD else _adam
            make(step, group, flags, part, gradient, x[part.start - begin : part.stop - begin])
    if not np.isfinite(x).all():
        step.nonfinite[0] = 1


def _parts(
    step: OptimizerStep, begin: int, end: int
) -> Iterator[tuple[Any, int, slice, np.ndarray]]:
    """Yield group, flags, place and gradient of the segments that reach into a part of the model.

    The tails of segments are parts of their own; only there the flags have `TAIL`.
    """
    offsets = step.segments["offset"]
    stops = offsets + step.segments["count"]
    for i in np.flatnonzero((offsets < end) & (stops > begin) & (step.segments["gradient"] != 0)):
        segment = step.segments[i]
        group = step.groups[segment["group"]]
        flags, first, last = int(group["flags"]), int(offsets[i]), int(stops[i])
        tail = last - (int(segment["count"]) % TORCH_VECTOR if flags & TAIL else 0)
        memory = (ctypes.c_float * (last - first)).from_address(int(segment["gradient"]))
        gradient = np.frombuffer(memory, np.float32)
        for start, stop, its in ((first, tail, flags & ~TAIL), (tail, last, flags)):
            part = slice(max(start, begin), min(stop, end))
            if part.start < part.stop:
                yield group, its, part, gradient[part.start - first : part.stop - first]


def _sgd(
    step: OptimizerStep, group: Any, flags: int, part: slice, gradient: np.ndarray, x: np.ndarray
) -> None:
    g = _prepared(group, flags, gradient)
    if flags & DECAY:
        g = fma(x, group["decay"], g)
    if flags & MOMENTUM:
        assert step.first is not None
        velocity = step.first[part]
        if flags & FIRST:
            velocity[:] = g
        elif flags & TAIL:
            velocity[:] = fma(velocity, group["momentum"], g * group["fresh"])
        else:
            velocity[:] = fma(g, group["fresh"], velocity * group["momentum"])
        g = fma(velocity, group["momentum"], g) if flags & NESTEROV else velocity
    x[:] = fma(g, group["rate"], x)


def _adam(
    step: OptimizerStep, group: Any, flags: int, part: slice, gradient: np.ndarray, x: np.ndarray
) -> None:
    assert step.first is not None and step.second is not None
    mean, square = step.first[part], step.second[part]
    g = _prepared(group, flags, gradient)
    if flags & DECAY:
        if flags & DECOUPLED:
            x *= group["decay"]
        else:
            g = fma(x, group["decay"], g)
    lerp, apart = group["lerp"], g - mean
    mean[:] = fma(apart, lerp, mean) if lerp < _F32(0.5) else fma(apart, lerp - _F32(1), g)
    share = group["fresh"] * g
    if flags & TAIL:
        square[:] = fma(square, group["momentum"], share * g)
    else:
        square[:] = fma(share, g, square * group["momentum"])
    u = square
    if flags & AMSGRAD:
        assert step.third is not None
        u = step.third[part]
        u[:] = np.where(square > u, square, u)
    x += group["rate"] * mean / (np.sqrt(u) / group["root"] + group["eps"])


def _prepared(group: Any, flags: int, gradient: np.ndarray) -> np.ndarray:
    g = gradient * group["factor"] if flags & FACTOR else gradient
    return -g if flags & MAXIMIZE else g


def fma(a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray) -> np.ndarray:
    """Return a b + c, float32, rounded once.

    The product is exact in float64. The sum is rounded to odd: to the neighbour with an odd last
    bit, if it is not exact; so that rounding it again, to float32, is as if it were the only time
    (Boldo and Melquiond, 2008).
    """
    product, addend = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum: exact
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    inexact = even & (error != 0) & np.isfinite(error)
    return np.where(inexact, odd, total).astype(np.float32)
