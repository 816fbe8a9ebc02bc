"""What `optimizer.step()` means while an optimizer belongs to a training: its step, or an error."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.closure import Closure, needs_closure
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from mpi_dasgd.training.step_hooks import StepHooks

__all__ = ["Attachment", "torch_optimizer"]

_attachments: weakref.WeakKeyDictionary[torch.optim.Optimizer, Attachment] = (
    weakref.WeakKeyDictionary()
)


class Attachment:
    """Tie between an optimizer and a training, from construction until `detach`.

    A call of `optimizer.step` that would train this rank alone is refused, until `attach` makes it
    a step of the training.

    Args:
        optimizer: optimizer of this rank.
        local: makes the optimizer's steps for the algorithm.
        algorithm: name of the algorithm, for messages.

    Raises:
        UserError: the optimizer belongs to another training, which is not closed.

    Attributes:
        is_closed: whether the training has ended.
        hooks: what makes `optimizer.step` a step of the training; None: it is none.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, local: TorchLocalOptimizer, algorithm: str
    ) -> None:
        self.is_closed = False
        self._optimizer = optimizer
        self._local = local
        self._algorithm = algorithm
        self.hooks: StepHooks | None = None
        self._needs_closure = needs_closure(optimizer)
        self.require_free(optimizer)
        if optimizer in _attachments:
            _attachments[optimizer].detach()
        self._guard = optimizer.register_step_pre_hook(self._refuse)
        _attachments[optimizer] = self

    @staticmethod
    def require_free(optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer of another training that is not closed.

        Raises:
            UserError: it is one.
        """
        earlier = _attachments.get(optimizer)
        if earlier is not None and not earlier.is_closed:
            raise UserError(
                "optimizer: it belongs to another Decentralized, which is still open; close() that "
                "one before, or give each its own optimizer"
            )

    def closure(self, function: Callable[[], Any] | None) -> Closure | None:
        """Return a closure of `optimizer.step`, or None, as a step of the training takes it.

        Raises:
            UserError: there is none, and the optimizer cannot do without.
        """
        if function is not None:
            return self._wrap(function)
        if self._needs_closure:
            raise UserError(
                f"optimizer: {type(self._optimizer).__name__} needs a closure that computes the "
                "loss: call training.step(samples, closure), or attach it by mpi_dasgd.attach and "
                "call optimizer.step(closure)"
            )
        return None

    def _wrap(self, function: Callable[[], Any]) -> Closure:
        return Closure(function, self._algorithm)

    def attach(self, make_step: Callable[[Closure | None], object]) -> None:
        """Have `optimizer.step` call `make_step` with its closure, or with None."""
        if self.hooks is None:
            self.hooks = StepHooks(self._optimizer, self._wrap, make_step)
            self._local.run_step = self.hooks.run

    def detach(self) -> None:
        """Leave the optimizer as it was before: from now on its steps train this rank alone."""
        self._guard.remove()
        if self.hooks is not None:
            self.hooks.remove()
            self.hooks = None
        _attachments.pop(self._optimizer, None)

    def close(self) -> None:
        """End the training: an attached optimizer refuses further steps, others are free again."""
        self.is_closed = True
        if self.hooks is None:
            self.detach()

    def _refuse(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if self._local.is_updating:
            return
        if self.is_closed:
            raise UserError(
                "optimizer.step: training is closed, and this rank would go on alone; call "
                "training.detach() if it shall, or make a new Decentralized"
            )
        if self.hooks is None:
            raise UserError(
                "optimizer.step: this rank would train alone; call training.step(samples) instead, "
                "or mpi_dasgd.attach, which makes optimizer.step() the decentralized step"
            )


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer of torch inside of wrappers such as accelerate's and Lightning's.

    Raises:
        UserError: there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return optimizer
