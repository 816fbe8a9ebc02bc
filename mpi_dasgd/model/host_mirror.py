"""The flat vector in host memory: the vector itself, or a copy of it that is made when it is used.

On a device the parameters are aligned, so that there may be gaps between them. In host memory there
are none: checkpoints and snapshots do not depend on where the model was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpi_dasgd.kernels.encoded import BUCKET
from mpi_dasgd.model.parameter_layout import Segment

__all__ = ["HostMirror"]


class HostMirror:
    """The flat vector as host memory has it.

    Args:
        vector: the flat vector, (padded,), where the parameters are.
        segments: layout of the vector.
        is_separate: whether host memory has a copy, also of a vector that is there itself.
    """

    def __init__(
        self, vector: torch.Tensor, segments: Sequence[Segment], *, is_separate: bool
    ) -> None:
        self._vector = vector
        self._copy: torch.Tensor | None = None if is_separate else vector
        self._parts = [s.part for s in segments]
        self._host_parts = [s.host_part for s in segments]
        self._has_gaps = self._parts != self._host_parts
        self._elements = -(-self._host_parts[-1].stop // BUCKET) * BUCKET

    @property
    def view(self) -> np.ndarray:
        """The vector, (padded,), in host memory; a copy of it is made at the first call."""
        view: np.ndarray = self._tensor().numpy()
        return view

    def _tensor(self) -> torch.Tensor:
        if self._copy is None:
            self._copy = torch.zeros(
                self._elements, dtype=self._vector.dtype, pin_memory=self._vector.is_cuda
            )
        return self._copy

    def fetch(self) -> None:
        """Have the copy hold what the vector holds."""
        copy = self._tensor()
        copy.copy_(self.without_gaps(self._vector))

    def store(self) -> None:
        """Have the vector hold what the copy holds."""
        if not self._has_gaps:
            self._vector.copy_(self._tensor())
            return
        source = self._tensor().to(self._vector.device)
        for part, host_part in zip(self._parts, self._host_parts, strict=True):
            self._vector[part] = source[host_part]

    def without_gaps(self, vector: torch.Tensor) -> torch.Tensor:
        """Return `vector`, of the layout of the vector, in that of host memory, where it is."""
        if not self._has_gaps:
            return vector
        dense = vector.new_zeros(self._elements)
        for part, host_part in zip(self._parts, self._host_parts, strict=True):
            dense[host_part] = vector[part]
        return dense

    def with_gaps(self, dense: torch.Tensor) -> torch.Tensor:
        """Return what `without_gaps` has made `dense` of."""
        if not self._has_gaps:
            return dense
        vector = dense.new_zeros(self._vector.numel())
        for part, host_part in zip(self._parts, self._host_parts, strict=True):
            vector[part] = dense[host_part]
        return vector
