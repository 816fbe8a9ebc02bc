"""Local optimizer of a rank over a torch module: gradient, learning rate, and update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpi_dasgd.errors import Diverged, UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.closure import Closure, needs_closure

__all__ = ["TorchLocalOptimizer"]


class TorchLocalOptimizer:
    """`mpi_dasgd.algorithms.LocalOptimizer` of a torch module.

    The learning rates are the user's: what the groups of the optimizer hold when it makes a step,
    by whatever schedule. The factors of this class multiply them for that step only.

    Args:
        optimizer: optimizer of the module.
        parameters: parameters of the module.
        rank: this rank, for messages.
        check_finite: whether to refuse gradients and models that are not finite.

    Attributes:
        local_step: gradients that this rank has computed so far.
        lr_scale: factor on the learning rates, of the schedule and of the gradient's delay.
        closure: closure of the step that is being made, if it has one.
        run_step: makes the optimizer's step with a closure, or without one (None).
        loss: what the newest step of the optimizer returned: the loss of its closure.
        lr: learning rate of the first parameter group in the newest step, or 0 without one.
        update_seconds: time spent in the optimizer so far.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: FlatParameters,
        rank: int = 0,
        *,
        check_finite: bool = True,
    ) -> None:
        self.local_step = 0
        self.lr_scale = 1.0
        self.closure: Closure | None = None
        self._unused_closure: Closure | None = None
        self.run_step: Callable[[Closure | None], Any] = self._run_optimizer
        self.is_updating = False
        self.loss: Any = None
        self.update_seconds = 0.0
        self._optimizer = optimizer
        self._parameters = parameters
        self._rank = rank
        self._check_finite = check_finite
        self._has_new_gradient = False
        self.lr = float(optimizer.param_groups[0].get("lr", 0.0))
        self._host_gradient: np.ndarray | None = None
        self._device_gradient: torch.Tensor | None = None

    @property
    def needs_closure(self) -> bool:
        """Whether the optimizer makes no step without a closure."""
        return needs_closure(self._optimizer)

    def forget_closure(self) -> None:
        """Make the next update without the closure of a step that was interrupted."""
        self.closure = self._unused_closure = None

    def begin_step(self, closure: Closure | None) -> None:
        """Count a gradient, which is there or which `closure` computes."""
        self.local_step += 1
        self.closure = self._unused_closure = closure
        self.loss = None
        self._has_new_gradient = True

    @property
    def gradient(self) -> np.ndarray:
        """Newest gradient, (padded,), in host memory; `apply` applies what it holds.

        Raises:
            Diverged: it is not finite.
        """
        if self.closure is not None:
            self.closure.evaluate_early()
        self._device_gradient = self._parameters.gather_gradient()
        self._unscale(self._device_gradient)
        self._host_gradient = self._device_gradient.cpu().numpy()
        if self._has_new_gradient:
            self._has_new_gradient = False
            self._require_finite(self._host_gradient, "gradient of")
        return self._host_gradient

    def apply(self, lr_scale: float = 1.0) -> None:
        """Make one step of the optimizer, at its rates times `self.lr_scale * lr_scale`.

        Raises:
            Diverged: a parameter is not finite after it; nobody has seen it yet.
        """
        started = time.perf_counter()
        device, host = self._device_gradient, self._host_gradient
        if device is not None and device.device.type != "cpu" and host is not None:
            device.copy_(torch.from_numpy(host))
        if host is not None:
            self._parameters.scatter_gradient()
        self._parameters.copy_to_device()  # what an exchange of this step has changed before
        closure, self._unused_closure = self._unused_closure, None  # one update of a step has it
        loss = self._update(lr_scale, closure)
        self.loss = loss if closure is not None else self.loss
        self._parameters.copy_to_host(update=True)
        self._require_finite(self._parameters.host_view, "parameter")
        self.update_seconds += time.perf_counter() - started

    def _run_optimizer(self, closure: Closure | None) -> Any:
        return self._optimizer.step(*(() if closure is None else (closure,)))

    def _update(self, lr_scale: float, closure: Closure | None) -> Any:
        """Run the optimizer's step with the learning rate of each group multiplied."""
        groups = self._optimizer.param_groups
        scaled: list[tuple[dict[str, Any], Any, Any]] = []
        if self.lr_scale != 1.0 or lr_scale != 1.0:
            for group in groups:
                lr = self._learning_rate(group)
                group["lr"] = lr * self.lr_scale * lr_scale
                scaled.append((group, lr, group["lr"]))
        self.lr = float(groups[0].get("lr", 0.0))
        self.is_updating = True
        try:
            return self.run_step(closure)
        finally:
            self.is_updating = False
            for group, lr, scaled_lr in scaled:
                if group["lr"] is scaled_lr:  # else a hook has set the rate: it is the user's
                    group["lr"] = lr

    def _learning_rate(self, group: dict[str, Any]) -> Any:
        if "lr" not in group:
            raise UserError(
                f"optimizer: the parameter groups of {type(self._optimizer).__name__} have no "
                "'lr', but this algorithm, schedule or delay-adaptive rule scales the learning "
                "rate; choose another optimizer, or adpsgd with a constant schedule and rule"
            )
        return group["lr"]

    def _unscale(self, gradient: torch.Tensor) -> None:
        """Divide by the factor that `GradScaler` would have a fused optimizer divide by."""
        optimizer: Any = self._optimizer
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            gradient /= scale.to(gradient.device)
            optimizer.grad_scale = None

    def require_finite_model(self) -> None:
        """Refuse a model that is not finite.

        Raises:
            Diverged: says which parameter.
        """
        self._require_finite(self._parameters.host_view, "parameter")

    def _require_finite(self, vector: np.ndarray, what: str) -> None:
        # The sum of squares is one pass at the speed of memory; only a large one needs a second.
        with np.errstate(over="ignore", invalid="ignore"):
            if not self._check_finite or np.isfinite(np.dot(vector, vector)):
                return
        bad = np.flatnonzero(~np.isfinite(vector))
        if bad.size:
            name = self._parameters.name_of(int(bad[0]))
            raise Diverged(
                f"rank {self._rank}, step {self.local_step}: {what} {name} became "
                f"{vector[bad[0]]} ({bad.size} elements of the model are not finite); no other "
                "rank has received it. Lower the learning rate, clip the gradients, or skip such "
                "batches; with GradScaler use mpi_dasgd.attach and scaler.step(optimizer)"
            )
