"""Models that are not finite: found on a device without waiting, and refused by name."""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import torch

from mpi_dasgd.device.base import Array, Device, Mark
from mpi_dasgd.errors import Diverged
from mpi_dasgd.model.flat_parameters import FlatParameters

__all__ = ["LateFiniteCheck", "refuse_nonfinite"]


class LateFiniteCheck:
    """Looks at a model on torch's current stream; the answer is read one step later.

    If the device has not come so far by then, the next step's check is left out: what is not finite
    stays so.

    Args:
        vector: the model, (elements,), on the device.
        device: the device.
    """

    def __init__(self, vector: torch.Tensor, device: Device) -> None:
        self._vector, self._device = vector, device
        self._largest = torch.zeros((), dtype=vector.dtype, pin_memory=vector.is_cuda)
        self._answer = self._largest.numpy()
        self._mark: Mark | None = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Look at the model as it is after step `step`, unless an answer is still to come."""
        if self._mark is None:
            largest = torch.linalg.vector_norm(self._vector, math.inf)  # NaN if an element is
            self._largest.copy_(largest, non_blocking=True)
            self._mark, self._step = self._device.mark(), step

    def failed_step(self, *, wait: bool = False) -> int | None:
        """Return the step after which the model was not finite; None if it was, or is not known.

        Args:
            wait: whether to wait for the answer.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self._mark is None:
            return None
        if wait:
            self._mark.wait()
        elif not self._mark.is_done:
            return None
        self._mark = None
        return None if math.isfinite(self._answer) else self._step


def refuse_nonfinite(parameters: FlatParameters, vector: Array, what: str, seen: str) -> NoReturn:
    """Refuse a vector that is not finite, or was not a step ago.

    Args:
        parameters: parameters of the model.
        vector: a vector of their layout.
        what: where it was found, and of what it is the vector: "parameter", "gradient of".
        seen: who has seen it.

    Raises:
        Diverged: always; says which parameter.
    """
    numbers = parameters.to_host(vector)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        what = f"{what} {parameters.name_of(int(bad[0]))} became {numbers[bad[0]]}"
    else:  # it has been set anew since
        what = f"{what} became infinite or NaN"
    raise Diverged(
        f"{what} ({bad.size} elements of the model are not finite); {seen}. Lower the learning "
        "rate, clip the gradients, or skip such batches; with GradScaler use mpi_dasgd.attach and "
        "scaler.step(optimizer)"
    )
