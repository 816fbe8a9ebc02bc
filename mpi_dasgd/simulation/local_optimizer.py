"""A virtual rank's training, as its algorithm sees it: SGD on a vector."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.algorithms import Algorithm

__all__ = ["NumpyLocalOptimizer"]


class NumpyLocalOptimizer:
    """The `mpi_dasgd.algorithms.LocalOptimizer` of a rank of a simulation.

    Args:
        x: its model, 1-D; changed in place.
        momentum, decay: as torch.optim.SGD has them.
        expected_sum: of all ranks' `mass`, shape of `x`, float64; moved along with every update.

    Attributes:
        local_step: gradients computed so far.
        gradient: the newest, shape of `x`.
        lr: learning rate of the next update.
        gradients_seen: gradients of all ranks when its model was taken.
        algorithm: whose weight of the mass counts.
    """

    def __init__(
        self, x: np.ndarray, momentum: float, decay: float, expected_sum: np.ndarray
    ) -> None:
        self.local_step = 0
        self.gradient = np.zeros_like(x)
        self.lr = 0.0
        self.gradients_seen = 0
        self._x = x
        self._momentum = momentum
        self._decay = decay
        self._expected_sum = expected_sum
        self._velocity = np.zeros_like(x) if momentum else None
        self.algorithm: Algorithm | None = None

    def apply(self, lr_scale: float = 1.0) -> None:
        """SGD with momentum and weight decay, as torch.optim.SGD has it."""
        direction = self.gradient
        if self._decay:
            direction = direction + self._decay * self._x
        if self._velocity is not None:
            self._velocity *= self._momentum
            self._velocity += direction
            direction = self._velocity
        change = self.lr * lr_scale * direction
        self._x -= change
        weight = 1.0 if self.algorithm is None else self.algorithm.mass_weight
        self._expected_sum -= change if weight == 1.0 else weight * change
