"""Local optimizer of a rank over a torch module: gradient, learning rate, and update."""

from __future__ import annotations

import time

import numpy as np
import torch

from mpi_dasgd.training.flat_parameters import FlatParameters

__all__ = ["TorchLocalOptimizer"]


class TorchLocalOptimizer:
    """`mpi_dasgd.algorithms.LocalOptimizer` of a torch module.

    Args:
        optimizer: optimizer of the module; its learning rates at construction are the base rates.
        parameters: parameters of the module.

    Attributes:
        local_step: gradients that this rank has computed so far.
        lr_scale: factor on the base rates, of the schedule and of the gradient's delay.
        update_seconds: time spent in the optimizer so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: FlatParameters) -> None:
        self.local_step = 0
        self.lr_scale = 1.0
        self.update_seconds = 0.0
        self._optimizer = optimizer
        self._parameters = parameters
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._host_gradient: np.ndarray | None = None
        self._device_gradient: torch.Tensor | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def gradient(self) -> np.ndarray:
        """Newest gradient, (padded,), float32, in host memory; `apply` applies what it holds."""
        self._device_gradient = self._parameters.gather_gradient()
        self._host_gradient = self._device_gradient.cpu().numpy()
        return self._host_gradient

    def apply(self, lr_scale: float = 1.0) -> None:
        """Make one step of the optimizer, at the base rates times `self.lr_scale * lr_scale`."""
        started = time.perf_counter()
        device, host = self._device_gradient, self._host_gradient
        if device is not None and device.device.type != "cpu" and host is not None:
            device.copy_(torch.from_numpy(host))
        self._parameters.copy_to_device()  # what an exchange of this step has changed before
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * self.lr_scale * lr_scale
        self._optimizer.step()
        self._parameters.copy_to_host()
        self.update_seconds += time.perf_counter() - started
