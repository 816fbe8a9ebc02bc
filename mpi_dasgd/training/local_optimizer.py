"""This rank's training, as its algorithm sees it: gradient, optimizer and learning rate."""

from __future__ import annotations

import time

import numpy as np
import torch

from mpi_dasgd.training.flat_parameters import FlatParameters

__all__ = ["TorchLocalOptimizer"]


class TorchLocalOptimizer:
    """The `mpi_dasgd.algorithms.LocalOptimizer` of a torch module.

    Args:
        optimizer: its learning rates at construction are the base rates.
        parameters: of the module.

    Attributes:
        local_step: gradients computed so far.
        lr_scale: what the schedule and the rule for delays multiply the base rates by.
        update_seconds: time spent in the optimizer so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: FlatParameters) -> None:
        self.local_step = 0
        self.lr_scale = 1.0
        self.update_seconds = 0.0
        self._optimizer = optimizer
        self._parameters = parameters
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._staged: np.ndarray | None = None
        self._flat: torch.Tensor | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def gradient(self) -> np.ndarray:
        """The gradient, flat; `update` applies what it then holds."""
        self._flat = self._parameters.gather_gradient()
        self._staged = self._flat.cpu().numpy()
        return self._staged

    def apply(self, lr_scale: float = 1.0) -> None:
        """One step of the optimizer, at the learning rate that global progress demands."""
        begun = time.perf_counter()
        if self._flat is not None and self._flat.device.type != "cpu" and self._staged is not None:
            self._flat.copy_(torch.from_numpy(self._staged))
        self._parameters.copy_to_device()  # what the algorithm has changed in this step, before the gradient
        for group, rate in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = rate * self.lr_scale * lr_scale
        self._optimizer.step()
        self._parameters.copy_to_host()
        self.update_seconds += time.perf_counter() - begun
