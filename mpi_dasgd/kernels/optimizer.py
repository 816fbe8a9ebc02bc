"""A step of a local optimizer on a flat model, which a pass over memory makes before it exchanges.

The bits are those of `torch.optim`: SGD as it always is, Adam and AdamW as with ``fused=True``.
``optimizer_math.h`` has the formulas. A step is described by *segments*, the parameters, each with
its gradient where autograd has left it, and by *groups*, the scalars of parameters that have them
alike.
"""

from __future__ import annotations

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
    "GROUP",
    "MAXIMIZE",
    "MOMENTUM",
    "NESTEROV",
    "SEGMENT",
    "SGD",
    "OptimizerStep",
    "adam_group",
    "sgd_group",
]

SGD, ADAM = 1, 2
"""Kinds of a group, MpdOptimizerKind of ``optimizer_math.h``."""

NESTEROV, DECAY, DECOUPLED, MAXIMIZE, MOMENTUM, FIRST, FACTOR, AMSGRAD = (1 << i for i in range(8))
"""Flags of a group, MpdOptimizerFlags of ``optimizer_math.h``."""

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
Group = tuple[int, int, float, float, float, float, float, float, float, float]


class OptimizerStep:
    """One step of an optimizer, to be made in a pass; the arrays are used again for the next.

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
        on_made: called when the pass is made (on a GPU: asked for), before anything that it has
            written is given away; raises `Diverged` if the model is not finite.
        native: description of the arrays that a back end keeps from call to call, or None.
    """

    __slots__ = (
        "first", "gradients", "groups", "native", "nonfinite", "on_made", "second", "segments",
        "third",
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
        self.on_made: Callable[[], None] = _nothing
        self.native: Any = None


def sgd_group(
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    factor: float = 1.0,
) -> Group:
    """Return the scalars of a step of ``torch.optim.SGD``, fields of `GROUP`.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch has them.
        first: whether there is no momentum buffer yet: it becomes the gradient.
        factor: on the gradients, before all else.
    """
    flags = MAXIMIZE * maximize | DECAY * (weight_decay != 0) | FACTOR * (factor != 1)
    if momentum != 0:
        flags |= MOMENTUM | NESTEROV * nesterov | FIRST * first
    return SGD, flags, factor, weight_decay, momentum, 1 - dampening, 0.0, -lr, 0.0, 0.0


def adam_group(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: float,
    *,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
    factor: float = 1.0,
) -> Group:
    """Return the scalars of step `step` (from 1) of ``torch.optim.Adam``, fields of `GROUP`.

    Args:
        lr, betas, eps, weight_decay, amsgrad, maximize: as torch has them.
        step: number of this step for these parameters, from 1.
        decoupled: whether the model decays, not the gradient (AdamW).
        factor: on the gradients, before all else.
    """
    beta1, beta2 = betas
    flags = MAXIMIZE * maximize | AMSGRAD * amsgrad | FACTOR * (factor != 1)
    decay = weight_decay
    if weight_decay != 0:
        flags |= DECAY | DECOUPLED * decoupled
        decay = 1 - lr * weight_decay if decoupled else weight_decay
    return (
        ADAM, flags, factor, decay, beta2, 1 - beta2, 1 - beta1, -(lr / (1 - beta1**step)),
        (1 - beta2**step) ** 0.5, eps,
    )  # fmt: skip


def _nothing() -> None:
    pass
