"""Models that are not finite: found on a device without waiting, and refused by name."""

from __future__ import annotations

import math
from collections import deque
from typing import NoReturn

import numpy as np
import torch

from mpi_dasgd.device.base import Array, Device, Mark
from mpi_dasgd.errors import Diverged
from mpi_dasgd.model.flat_parameters import FlatParameters

__all__ = ["LateFiniteCheck", "refuse_nonfinite"]


class LateFiniteCheck:
    """Looks at a model on torch's current stream; the answer is read one step later.

    If the device has not come so far by then, steps in between are left out, but neither the newest
    nor the one before it: what is not finite stays so.

    Args:
        vector: the model, (elements,), on the device.
        device: the device.
    """

    _PLACES = 3  # for the answers that the device will give first, last but one, and last

    def __init__(self, vector: torch.Tensor, device: Device) -> None:
        self._vector, self._device = vector, device
        largest = torch.zeros(self._PLACES, dtype=vector.dtype, pin_memory=vector.is_cuda)
        self._largest, self._answers = largest.unbind(), largest.numpy()
        self._asked: deque[tuple[int, int, Mark]] = deque()  # step, where the answer will be, when
        self._free = [*range(self._PLACES)]

    def begin(self, step: int) -> None:
        """Look at the model as it is after step `step`."""
        if not self._free:
            self._free.append(self._asked[1][1])
            del self._asked[1]
        place = self._free.pop()
        largest = torch.linalg.vector_norm(self._vector, math.inf)  # NaN if an element is
        self._largest[place].copy_(largest, non_blocking=True)
        self._asked.append((step, place, self._device.mark()))

    def failed_step(self, *, wait: bool = False) -> int | None:
        """Return the step after which the model was not finite; None if it was, or is not known.

        Args:
            wait: whether to wait for the answers of all steps.

        Raises:
            DeviceFailed: the device has failed.
        """
        while self._asked:
            step, place, mark = self._asked[0]
            if wait:
                mark.wait()
            elif not mark.is_done:
                return None
            self._asked.popleft()
            self._free.append(place)
            if not math.isfinite(self._answers[place]):
                self._free += [place for _, place, _ in self._asked]
                self._asked.clear()
                return step
        return None


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
