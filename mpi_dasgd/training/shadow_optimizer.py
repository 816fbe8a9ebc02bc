"""Local optimizers of a shadow, which takes part in the steps of others without a gradient."""

from __future__ import annotations

import numpy as np
import torch

from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer

__all__ = ["FollowingOptimizer", "IdleOptimizer"]


class IdleOptimizer:
    """Local optimizer that has no gradient, and changes nothing.

    Args:
        x: model of the rank, (elements,).

    Attributes:
        local_step: number of the step that the shadow takes part in.
    """

    def __init__(self, x: np.ndarray) -> None:
        self.local_step = 0
        self._x = x
        self._gradient: np.ndarray | None = None

    @property
    def gradient(self) -> np.ndarray:
        """Zeros, (elements,), which an exchange may have overwritten since the last call.

        They are -0, which says of each parameter that this rank has no gradient of it; see
        `GradientVector`.
        """
        if self._gradient is None:
            self._gradient = np.empty_like(self._x)
        self._gradient[:] = -0.0
        return self._gradient

    def apply(self, lr_scale: float = 1.0) -> None:
        """Do nothing."""

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""


class FollowingOptimizer:
    """Local optimizer that has no gradient of its own, and applies the mean of the others'.

    For algorithms whose ranks all have one model: it stays so, and with it momentum and the like.

    Args:
        local: local optimizer of the rank.
        parameters: parameters of its model; their `grad` is kept.

    Attributes:
        local_step: number of the step that the shadow takes part in.
    """

    def __init__(self, local: TorchLocalOptimizer, parameters: FlatParameters) -> None:
        self.local_step = 0
        self._local = local
        self._parameters = parameters.parameters
        self._kept: list[torch.Tensor | None] = []

    @property
    def gradient(self) -> np.ndarray:
        """That of a rank in whose batch no parameter was used."""
        # Copies, since some may be views of the vector that is exchanged.
        self._kept = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        self._local.forget_closure()
        return self._local.gradient

    def apply(self, lr_scale: float = 1.0) -> None:
        """Make the step of the optimizer."""
        self._local.apply(lr_scale)
        for p, grad in zip(self._parameters, self._kept, strict=True):
            p.grad = grad

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""
