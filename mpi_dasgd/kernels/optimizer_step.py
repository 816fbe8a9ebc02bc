"""A step of a local optimizer as back ends take it: its parameters, scalars and state."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "ADAM",
    "AMSGRAD",
    "DECAY",
    "DECOUPLED",
    "FACTOR",
    "FIRST",
    "FLAGS",
    "GROUP",
    "MAXIMIZE",
    "MOMENTUM",
    "NESTEROV",
    "SEGMENT",
    "SGD",
    "TAIL",
    "TORCH_VECTOR",
    "OptimizerStep",
    "OptimizerStruct",
]

SGD, ADAM = 1, 2
"""Kinds of a group, MpdOptimizerKind of ``optimizer_math.h``."""

NESTEROV, DECAY, DECOUPLED, MAXIMIZE, MOMENTUM, FIRST, FACTOR, AMSGRAD, TAIL = (
    1 << i for i in range(9)
)
FLAGS = (
    "NESTEROV", "DECAY", "DECOUPLED", "MAXIMIZE", "MOMENTUM", "FIRST", "FACTOR", "AMSGRAD", "TAIL",
)  # fmt: skip
"""Names of the flags of a group, in the order of their bits."""

TORCH_VECTOR = 8
"""Elements that torch's fused kernels take at a time, MPD_TORCH_VECTOR of ``optimizer_math.h``."""

GROUP = np.dtype(
    [
        ("kind", "i4"),
        ("flags", "i4"),
        *(
            (name, "f4")
            for name in ("factor", "decay", "momentum", "fresh", "lerp", "rate", "root", "eps")
        ),
    ]
)
"""Scalars of a group, MpdOptimizerGroup of ``optimizer_math.h``."""

SEGMENT = np.dtype([("offset", "i8"), ("count", "i8"), ("gradient", "u8"), ("group", "i8")])
"""A parameter, MpdOptimizerSegment of ``optimizer_math.h``: first element in the flat vectors,
number of elements, address of its gradient (0: it has none, and is left out), index of its group.
Segments are in order and do not overlap."""

Array = Any  # NumPy or CuPy


class OptimizerStruct(ctypes.Structure):
    """Mirror of MpdOptimizer of ``optimizer_math.h``."""

    _fields_ = (
        ("segments", ctypes.c_void_p),
        ("segment_count", ctypes.c_int64),
        ("groups", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("third", ctypes.c_void_p),
        ("nonfinite", ctypes.c_void_p),
    )


class OptimizerStep:
    """One step of an optimizer, to be made in a pass; the arrays are used again for the next.

    Their contents may change from step to step, the arrays themselves may not.

    Args:
        segments: `SEGMENT`, shape (segments,).
        groups: `GROUP`, shape (groups,).
        first: momentum buffer, or exp_avg: float32, shape of the model; None: there is none.
        second: exp_avg_sq, likewise.
        third: max_exp_avg_sq, likewise.

    Attributes:
        nonfinite: int64, (1,); set to 1 by a pass that leaves an element of the model that is
            infinite or NaN behind the update, before it exchanges. Whoever makes a step clears it.
        gradients: what keeps the gradients alive until the pass is made.
        refuses_nonfinite: whether `on_made` raises if `nonfinite` is set.
        on_made: called when the pass is made (on a GPU: asked for), before anything that it has
            written is given away; raises `Diverged` if the model is not finite and that
            is refused.
        native: description of the arrays that a back end keeps from call to call, or None.
    """

    __slots__ = (
        "first", "gradients", "groups", "native", "nonfinite", "on_made", "refuses_nonfinite",
        "second", "segments", "third",
    )  # fmt: skip

    def __init__(
        self,
        segments: np.ndarray,
        groups: np.ndarray,
        first: Array | None = None,
        second: Array | None = None,
        third: Array | None = None,
    ) -> None:
        self.segments, self.groups = segments, groups
        self.first, self.second, self.third = first, second, third
        self.nonfinite = np.zeros(1, np.int64)
        self.gradients: Any = None
        self.refuses_nonfinite = True
        self.on_made: Callable[[], None] = _nothing
        self.native: Any = None


def _nothing() -> None:
    pass
