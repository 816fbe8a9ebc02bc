"""The struct by which the native library reads a step of an optimizer."""

from __future__ import annotations

import ctypes

import numpy as np

from mpi_dasgd.kernels.optimizer_step import OptimizerStep, OptimizerStruct

__all__ = ["optimizer_struct"]


def optimizer_struct(step: OptimizerStep | None) -> int | None:
    """Return the address of a step's OptimizerStruct, which is made once per step, or None."""
    if step is None:
        return None
    struct: OptimizerStruct | None = step.native
    if struct is None:
        struct = step.native = OptimizerStruct(
            step.segments.ctypes.data, step.segments.size, step.groups.ctypes.data,
            _address(step.first), _address(step.second), _address(step.third),
            step.nonfinite.ctypes.data,
        )  # fmt: skip
    return ctypes.addressof(struct)


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data
