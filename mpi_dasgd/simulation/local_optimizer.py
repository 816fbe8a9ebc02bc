"""SGD on a NumPy vector: the local optimizer of a virtual rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpi_dasgd.config.schema import OptimizerConfig
from mpi_dasgd.errors import UserError

__all__ = ["NumpyLocalOptimizer"]


class NumpyLocalOptimizer:
    """The `mpi_dasgd.algorithms.LocalOptimizer` of a rank of a simulation.

    Args:
        x: model of the rank, 1-D; changed in place.
        config: section ``optimizer`` of a configuration.

    Attributes:
        local_step: gradients computed so far.
        gradient: the newest gradient, shape and dtype of `x`.
        lr: learning rate of the next update.
        gradients_seen: gradients of all ranks when the model of the newest gradient was taken.
        on_decrement: called with what every update takes from the model, shape of `x`; None for
            no call.

    Raises:
        UserError: `config` is not SGD with momentum and weight decay.
    """

    def __init__(self, x: np.ndarray, config: OptimizerConfig) -> None:
        self.local_step = 0
        self.gradient = np.zeros_like(x)
        self.lr = 0.0
        self.gradients_seen = 0
        self.on_decrement: Callable[[np.ndarray], None] | None = None
        self._x = x
        self._momentum, self._weight_decay = _momentum_and_decay(config)
        self._velocity = np.zeros_like(x) if self._momentum else None

    def apply(self, lr_scale: float = 1.0) -> None:
        """Make a step of SGD with momentum and weight decay, as torch.optim.SGD has it.

        Args:
            lr_scale: factor on the learning rate of this step.
        """
        direction = self.gradient
        if self._weight_decay:
            direction = direction + self._weight_decay * self._x
        if self._velocity is not None:
            self._velocity *= self._momentum
            self._velocity += direction
            direction = self._velocity
        decrement = self.lr * lr_scale * direction
        self._x -= decrement
        if self.on_decrement is not None:
            self.on_decrement(decrement)

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""


def _momentum_and_decay(config: OptimizerConfig) -> tuple[float, float]:
    options = dict(config.options)
    momentum, decay = options.pop("momentum", 0.0), options.pop("weight_decay", 0.0)
    if config.name != "SGD" or options or isinstance(momentum, list) or isinstance(decay, list):
        raise UserError(
            "optimizer: `simulate` knows SGD with momentum and weight_decay, got "
            f"{config.name} {dict(config.options)}"
        )
    return float(momentum), float(decay)
