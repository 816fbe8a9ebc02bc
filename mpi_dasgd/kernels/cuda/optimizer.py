"""A step of an optimizer on a GPU: ``optimizer.h``, as the first stage of other kernels, and alone.

The bits are those of the CPU. State is on the device, and gradients are read where they are;
segments and groups are in memory of the host, and what has changed of them is copied to the device.
Nothing waits. `OptimizerStep.nonfinite` is left alone: who looks at a model on a GPU does so later.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.cuda.program import (
    POINTER,
    THREADS,
    Program,
    aligned,
    multiprocessors,
)
from mpi_dasgd.kernels.cuda.table import DeviceTable
from mpi_dasgd.kernels.encoded import Array
from mpi_dasgd.kernels.optimizer_step import ADAM, SGD, OptimizerStep, OptimizerStruct

__all__ = [
    "KINDS",
    "NO_STAGE",
    "OPTIMIZER",
    "OPTIMIZER_ARGUMENTS",
    "STAGE",
    "STAGE_FORMAT",
    "Stage",
    "begin",
]

_BLOCKS = 2  # per multiprocessor
_WARP_ELEMENTS = 512  # that a warp processes at a time

STAGE = np.dtype(OptimizerStruct)
"""MpdOptimizer of ``optimizer_math.h``, the last field of an argument of kernels with a stage."""

STAGE_FORMAT = "Qq5Q"
"""Its fields, for `struct.Struct`."""

OPTIMIZER_ARGUMENTS = np.dtype(
    [("x", POINTER), ("elements", np.int64), ("optimizer", STAGE)], align=True
)
"""Mirror of MpdOptimizerArguments of ``optimizer.cu``."""

OPTIMIZER = Program("optimizer.cu", OPTIMIZER_ARGUMENTS, f"=Qq{STAGE_FORMAT}")
"""The kernels of ``optimizer.cu``."""

KINDS = {SGD: "sgd", ADAM: "adam"}
"""Kinds of groups as names of kernels have them. A kernel makes steps of one kind."""


class Stage(NamedTuple):
    """What a launch does first.

    Attributes:
        kind: kind of the optimizer, of `KINDS`; "": there is none.
        define: option of the compiler by which a source contains the kernels with this stage.
        values: value of `STAGE`.
    """

    kind: str
    define: str
    values: tuple[int, ...]


NO_STAGE = Stage("", "-DMPD_OPTIMIZER=0", (0,) * 7)
"""No optimizer."""


def begin(step: OptimizerStep, x: Array, *, alone: bool) -> Stage:
    """Begin a pass over a model with a step of an optimizer.

    Args:
        step: the step.
        x: model, float32, shape (elements,), aligned to 16 bytes; changed in place.
        alone: whether no launch can make the step as a stage: it is enqueued alone.

    Returns:
        What the next launch has to do first. A step with groups of two kinds is enqueued but for
        the last kind.

    Raises:
        UserError: an array is not aligned as the kernels access it, or the device is too old.
    """
    stage, at = NO_STAGE, aligned("x", x, 16)
    if step.native is None:
        step.native = _OnDevice(step)
    values = step.native.values(step)
    for kind in sorted(KINDS.keys() & set(step.groups["kind"].tolist())):  # 0: not used
        if stage.kind:
            _launch(stage, at, x.size)
        stage = Stage(KINDS[kind], f"-DMPD_OPTIMIZER={kind}", values)
    if alone and stage.kind:
        _launch(stage, at, x.size)
        return NO_STAGE
    return stage


def _launch(stage: Stage, at: int, elements: int) -> None:
    """Enqueue a stage alone, on the model at an address."""
    blocks = min(_BLOCKS * multiprocessors(), -(-elements // (_WARP_ELEMENTS * (THREADS // 32))))
    OPTIMIZER.launch(f"mpd_{stage.kind}", (stage.define,), blocks, at, elements, *stage.values)


class _OnDevice:
    """A step as the device sees it.

    Args:
        step: the step.

    Raises:
        UserError: its state is not aligned as the kernels access it.
    """

    def __init__(self, step: OptimizerStep) -> None:
        state = (aligned(name, getattr(step, name), 16) for name in ("first", "second", "third"))
        self._state = (*state, 0)
        self._table = DeviceTable()

    def values(self, step: OptimizerStep) -> tuple[int, ...]:
        """Return a value of `STAGE`, which holds for what is enqueued on this stream from now on.

        Raises:
            UserError: a gradient is not aligned to its elements.
        """
        groups, segments, table = step.groups, step.segments, self._table
        content = groups.tobytes() + segments.tobytes()
        if content != table.content:
            if np.bitwise_or.reduce(segments["gradient"]) % 4:
                raise UserError(
                    "gradient: expected memory that is aligned to its elements; make a copy"
                )
            table.update(content)
        at = table.address
        return at + groups.nbytes, segments.size, at, *self._state
