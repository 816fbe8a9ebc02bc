"""Local optimizer of a rank over a torch module: gradient, learning rate, and update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch

from mpi_dasgd.errors import Diverged, UserError
from mpi_dasgd.kernels.finite import prepare_all_finite
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
        run_step: makes the optimizer's step with a closure, or without one (None); None: the
            optimizer itself does.
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
        self.run_step: Callable[[Closure | None], Any] | None = None
        self.is_updating = False
        self.loss: Any = None
        self.update_seconds = 0.0
        self._optimizer = optimizer
        self._parameters = parameters
        self._rank = rank
        self._check_finite = check_finite
        self._has_new_gradient = False
        self.lr = float(optimizer.param_groups[0].get("lr", 0.0))
        self._model_is_finite = prepare_all_finite(parameters.host_view)
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
        gradient = self._parameters.gather_gradient()
        self._unscale(gradient)
        host = self._host_gradient
        if host is None or gradient is not self._device_gradient or not self._parameters.on_host:
            self._device_gradient = gradient
            self._host_gradient = host = gradient.cpu().numpy()
            self._gradient_is_finite = prepare_all_finite(host)
        if self._has_new_gradient:
            self._has_new_gradient = False
            if self._check_finite and not self._gradient_is_finite():
                self._refuse(host, "gradient of")
        return host

    def apply(self, lr_scale: float = 1.0) -> None:
        """Make one step of the optimizer, at its rates times `self.lr_scale * lr_scale`.

        Raises:
            Diverged: a parameter is not finite after it; nobody has seen it yet.
        """
        started = time.perf_counter()
        device, host = self._device_gradient, self._host_gradient
        if device is not None and host is not None:
            if not self._parameters.on_host:
                device.copy_(torch.from_numpy(host))
            self._parameters.scatter_gradient()
        self._parameters.copy_to_device()  # what an exchange of this step has changed before
        closure, self._unused_closure = self._unused_closure, None  # one update of a step has it
        loss = self._update(lr_scale, closure)
        self.loss = loss if closure is not None else self.loss
        self._parameters.copy_to_host(update=True)
        self.require_finite_model()
        self.update_seconds += time.perf_counter() - started

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
            if self.run_step is not None:
                return self.run_step(closure)
            return self._optimizer.step() if closure is None else self._optimizer.step(closure)
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
        if self._check_finite and not self._model_is_finite():
            self._refuse(self._parameters.host_view, "parameter")

    def _refuse(self, vector: np.ndarray, what: str) -> NoReturn:
        bad = np.flatnonzero(~np.isfinite(vector))
        name = self._parameters.name_of(int(bad[0]))
        raise Diverged(
            f"rank {self._rank}, step {self.local_step}: {what} {name} became "
            f"{vector[bad[0]]} ({bad.size} elements of the model are not finite); no other "
            "rank has received it. Lower the learning rate, clip the gradients, or skip such "
            "batches; with GradScaler use mpi_dasgd.attach and scaler.step(optimizer)"
        )
