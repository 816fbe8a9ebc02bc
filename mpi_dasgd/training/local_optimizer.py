"""Local optimizer of a rank over a torch module: gradient, learning rate, and update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from mpi_dasgd.device.base import Array
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.finite import prepare_all_finite
from mpi_dasgd.kernels.optimizer import OptimizerStep, prepared
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.closure import Closure, needs_closure
from mpi_dasgd.training.finite_check import LateFiniteCheck, refuse_nonfinite
from mpi_dasgd.training.fused_optimizer import FusedOptimizer

__all__ = ["TorchLocalOptimizer"]

_UNSEEN = "no other rank has received it"
_LATE = (
    "on a GPU this is seen one step late, so that other ranks may have averaged with it meanwhile"
)


class TorchLocalOptimizer:
    """`mpi_dasgd.algorithms.LocalOptimizer` of a torch module.

    The learning rates are the user's: what the groups of the optimizer hold when it makes a step,
    by whatever schedule. The factors of this class multiply them for that step only.

    Args:
        optimizer: optimizer of the module.
        parameters: parameters of the module.
        rank: this rank, for messages.
        check_finite: whether to refuse gradients and models that are not finite.
        fused: whether steps are made in passes of ours where that can be; else torch makes them.
        threads: number of CPU threads of a pass that only makes a step.

    Attributes:
        local_step: gradients that this rank has computed so far.
        lr_scale: factor on the learning rates, of the schedule and of the gradient's delay.
        closure: closure of the step that is being made, if it has one.
        run_step: makes the optimizer's step with a closure, or without one (None); None: the
            optimizer itself does.
        loss: what the newest step of the optimizer returned: the loss of its closure.
        lr: learning rate of the first parameter group in the newest step, or 0 without one.
        device: where the model is exchanged.
        update_seconds: time that this thread has spent in the optimizer so far; on a device, time
            to ask for its work. Of a step that is made in the pass of an exchange, what comes
            before and after that pass.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: FlatParameters,
        rank: int = 0,
        *,
        check_finite: bool = True,
        fused: bool = True,
        threads: int = 1,
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
        self.device = parameters.device
        self._late_check: LateFiniteCheck | None = None
        if self.device.is_asynchronous:
            self._late_check = LateFiniteCheck(parameters.flat, self.device)
        else:
            self._model_is_finite = prepare_all_finite(parameters.vector)
        self._fused: FusedOptimizer | None = None
        if fused:
            self._fused = FusedOptimizer(optimizer, parameters)
        self._threads = threads
        self._made_alone: OptimizerStep | None = None  # what `_make_alone` makes
        self._gradient: Array | None = None
        self._gradient_tensor: torch.Tensor | None = None

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
    def gradient(self) -> Array:
        """Newest gradient, (padded,), as the model is exchanged; `apply` applies what it holds.

        Raises:
            Diverged: it is not finite.
        """
        if self.closure is not None:
            self.closure.evaluate_early()
        tensor = self._parameters.gather_gradient()
        self._unscale(tensor)
        gradient = self._gradient
        if gradient is None or tensor is not self._gradient_tensor or self._parameters.is_mirrored:
            self._gradient_tensor = tensor
            self._gradient = gradient = self._exchanged_form(tensor)
        if self._has_new_gradient:
            self._has_new_gradient = False
            if self._check_finite and not self._gradient_is_finite():
                self._refuse(gradient, "gradient of", _UNSEEN)
        return gradient

    def _exchanged_form(self, tensor: torch.Tensor) -> Array:
        """Return a gradient as an array of the device on which the model is exchanged."""
        if self.device.is_asynchronous:
            self._gradient_is_finite = lambda: bool(torch.isfinite(tensor).all())
            return self.device.vector(tensor)
        gradient = tensor.cpu().numpy()
        self._gradient_is_finite = prepare_all_finite(gradient)
        return gradient

    def apply(self, lr_scale: float = 1.0) -> None:
        """Make one step of the optimizer, at its rates times `self.lr_scale * lr_scale`.

        Raises:
            Diverged: a parameter is not finite after it, and nobody has seen it yet; on a device,
                after the step before, and others may have.
        """
        started = time.perf_counter()
        self._prepare_update()
        update = self._fused_update(lr_scale)
        if update is not None:
            if update is not self._made_alone:
                self._make_alone = prepared(update, self._parameters.vector, self._threads)
                self._made_alone = update
            self._make_alone()
            self._complete_update(update)
        else:
            self._make_torchs_step(lr_scale)
        self.update_seconds += time.perf_counter() - started

    def fused_update(self, lr_scale: float = 1.0) -> OptimizerStep | None:
        """Return the step that `apply` would make; None: torch has to make it.

        Args:
            lr_scale: as for `apply`.

        Raises:
            Diverged: see `apply`; after the pass, `OptimizerStep.on_made` raises it.
        """
        if self._fused is None:
            return None
        started = time.perf_counter()
        self._prepare_update()
        update = self._fused_update(lr_scale)
        self.update_seconds += time.perf_counter() - started
        return update

    def _prepare_update(self) -> None:
        """Have the parameters and their gradients hold what exchanges have made of them."""
        if self._late_check is not None:
            self.refuse_known_updates()
        tensor, gradient = self._gradient_tensor, self._gradient
        if tensor is not None and gradient is not None:
            if self._parameters.is_mirrored:
                tensor.copy_(torch.from_numpy(gradient))
            self._parameters.scatter_gradient()
        self._parameters.scatter()

    def _fused_update(self, lr_scale: float) -> OptimizerStep | None:
        if self._fused is None or self._unused_closure is not None:
            return None
        update = self._fused.prepare(self.lr_scale, lr_scale)
        if update is not None:
            self.lr = self._fused.lr
            update.on_made, update.refuses_nonfinite = self._on_made, self._check_finite
            self._made = update
        return update

    def _on_made(self) -> None:
        started = time.perf_counter()
        self._complete_update(self._made)
        self.update_seconds += time.perf_counter() - started

    def _complete_update(self, update: OptimizerStep) -> None:
        """Note that a pass has made a step.

        Raises:
            Diverged: see `apply`.
        """
        assert self._fused is not None
        self._fused.complete()
        if not self._check_finite:
            return
        if self._late_check is not None:
            self._late_check.begin(self.local_step)
        elif update.nonfinite[0]:
            self._refuse(self._parameters.vector, "parameter", _UNSEEN)

    def _make_torchs_step(self, lr_scale: float) -> None:
        closure, self._unused_closure = self._unused_closure, None  # one update of a step has it
        loss = self._update(lr_scale, closure)
        self.loss = loss if closure is not None else self.loss
        self._parameters.gather(update=True)
        if self._late_check is None:
            self.require_finite_model()
        elif self._check_finite:
            self._late_check.begin(self.local_step)

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
        """Refuse a model that is not finite, as it is now. Waits for a device.

        Raises:
            Diverged: says which parameter.
        """
        if not self._check_finite:
            return
        if self._late_check is not None:
            self._refuse_late(self._late_check.failed_step(wait=True))
            self._late_check.begin(self.local_step)
            is_finite = self._late_check.failed_step(wait=True) is None
        else:
            is_finite = self._model_is_finite()
        if not is_finite:
            self._refuse(self._parameters.vector, "parameter", _UNSEEN)

    def refuse_known_updates(self) -> None:
        """Refuse a model of which a device has told that it was not finite. Never waits.

        Raises:
            Diverged: see `apply`.
        """
        if self._late_check is not None and self._check_finite:
            self._refuse_late(self._late_check.failed_step())

    def require_finite_updates(self) -> None:
        """Refuse a model that was not finite after an update, if that is not known yet.

        Raises:
            Diverged: see `require_finite_model`.
        """
        if self._late_check is not None and self._check_finite:
            self._refuse_late(self._late_check.failed_step(wait=True))

    def _refuse_late(self, step: int | None) -> None:
        if step is not None:
            self._refuse(self._parameters.vector, "parameter", _LATE, step)

    def _refuse(self, vector: Array, what: str, seen: str, step: int | None = None) -> NoReturn:
        step = step or self.local_step
        refuse_nonfinite(self._parameters, vector, f"rank {self._rank}, step {step}: {what}", seen)
