"""The closure of an optimizer's step, evaluated early where an algorithm needs its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from mpi_dasgd.errors import UserError

__all__ = ["Closure", "needs_closure"]


class Closure:
    """A function that computes loss and gradient, as `torch.optim.Optimizer.step` takes it.

    The optimizer evaluates it. An algorithm that exchanges gradients needs one before: then it is
    evaluated early, and the optimizer is given that loss, once.

    Args:
        function: clears the gradients, computes loss and gradients, and returns the loss.
        reader: name of what needs the gradient early, for the message.

    Attributes:
        on_gradient: called when a gradient was computed, or asked of a device.

    Raises:
        UserError: at its second call after an early evaluation, as of LBFGS: the optimizer would
            go on with a gradient of this rank alone.
    """

    def __init__(self, function: Callable[[], Any], reader: str) -> None:
        self._function = function
        self._reader = reader
        self._is_early = False
        self._calls = 0
        self._loss: Any = None
        self.on_gradient: Callable[[], object] = _ignore

    def evaluate_early(self) -> None:
        """Compute the gradient now, if it has not been computed."""
        if not self._is_early:
            self._is_early = True
            with torch.enable_grad():
                self._loss = self._function()
            self.on_gradient()

    def __call__(self) -> Any:
        if not self._is_early:
            loss = self._function()
            self.on_gradient()
            return loss
        self._calls += 1
        if self._calls > 1:
            raise UserError(
                "optimizer: it evaluates its closure more than once per step, but "
                f"{self._reader!r} exchanges the gradient of one evaluation; use an algorithm that "
                "exchanges models, such as adpsgd or local_sgd"
            )
        return self._loss


def _ignore() -> None:
    pass


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer makes no step without a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty
