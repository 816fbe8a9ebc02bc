"""A step of a local optimizer on a flat model, which a pass over memory makes before it exchanges.

The bits are those of `torch.optim`: SGD plain or with ``fused=True``, Adam and AdamW as with
``fused=True`` (the plain ones round otherwise).
``optimizer_math.h`` has the formulas. A step is described by *segments*, the parameters, each with
its gradient where autograd has left it, and by *groups*, the scalars of parameters that have them
alike.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from mpi_dasgd.kernels import lattice, native, optimizer_reference
from mpi_dasgd.kernels.encoded import FusedStep
from mpi_dasgd.kernels.optimizer_native import optimizer_struct
from mpi_dasgd.kernels.optimizer_step import (
    ADAM,
    AMSGRAD,
    DECAY,
    DECOUPLED,
    FACTOR,
    FIRST,
    GROUP,
    MAXIMIZE,
    MOMENTUM,
    NESTEROV,
    SEGMENT,
    SGD,
    TAIL,
    Array,
    OptimizerStep,
)

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
    "TAIL",
    "Group",
    "OptimizerStep",
    "adam_group",
    "prepared",
    "run",
    "run_part",
    "sgd_group",
]

Group = tuple[int, int, float, float, float, float, float, float, float, float]
"""Fields of `GROUP`."""


def run(step: OptimizerStep, x: Array, threads: int = 1) -> None:
    """Make a step alone, without an exchange.

    Args:
        step: step to make; `OptimizerStep.nonfinite` is set as by any pass.
        x: model, float32, shape (elements,); changed in place.
        threads: number of CPU threads; the result does not depend on it.

    Raises:
        UserError: the arrays do not belong together.
    """
    prepared(step, x, threads)()


def prepared(step: OptimizerStep, x: Array, threads: int = 1) -> Callable[[], None]:
    """Return a function that makes a step alone at each call, as its arrays are then.

    Args:
        step, x, threads: see `run`; the function keeps the arrays.

    Raises:
        UserError: the arrays do not belong together.
    """
    alone = FusedStep(x, threads)
    alone.optimizer = step
    alone.validate()
    backend = lattice.backend_of(x)
    if not hasattr(backend, "prepared"):
        return partial(backend.run, alone)
    make = backend.prepared(alone)

    def run_prepared(_alone: FusedStep = alone) -> None:
        make()

    return run_prepared


def run_part(step: OptimizerStep, x: np.ndarray, begin: int) -> None:
    """Make a step on a part of a model in host memory: for codecs that pass over it by blocks.

    Args:
        step: step of the whole model.
        x: the part, float32, 1-D, contiguous; changed in place.
        begin: index of its first element in the model.
    """
    function = _native_range()
    if function is None:
        optimizer_reference.update(step, x, begin)
        return
    segment = ctypes.c_int64(-1)
    end = begin + x.size
    function(optimizer_struct(step), x.ctypes.data, begin, end, ctypes.byref(segment), 0)


@cache
def _native_range() -> Any:
    library = native.load()
    if library is None:
        return None
    pointer = ctypes.c_void_p
    function = library.mpd_optimizer_range
    function.argtypes = [
        pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer, ctypes.c_int,
    ]  # fmt: skip
    function.restype = None
    return function


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
    fused: bool = False,
) -> Group:
    """Return the scalars of a step of ``torch.optim.SGD``, fields of `GROUP`.

    Args:
        lr, momentum, dampening, weight_decay, nesterov, maximize: as torch has them.
        first: whether there is no momentum buffer yet: it becomes the gradient.
        factor: on the gradients, before all else.
        fused: whether the bits are those of ``fused=True``; they differ in the last elements of a
            parameter.
    """
    flags = MAXIMIZE * maximize | DECAY * (weight_decay != 0) | FACTOR * (factor != 1)
    flags |= TAIL * fused
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
    flags = TAIL | MAXIMIZE * maximize | AMSGRAD * amsgrad | FACTOR * (factor != 1)
    decay = weight_decay
    if weight_decay != 0:
        flags |= DECAY | DECOUPLED * decoupled
        decay = 1 - lr * weight_decay if decoupled else weight_decay
    return (
        ADAM, flags, factor, decay, beta2, 1 - beta2, 1 - beta1, -(lr / (1 - beta1**step)),
        math.sqrt(1 - beta2**step), eps,
    )  # fmt: skip
