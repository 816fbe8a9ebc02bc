"""The optimizer's own `step` as a step of the algorithm, by torch's step hooks.

An algorithm calls `LocalOptimizer.apply` somewhere in its step; a user's loop, or a framework,
calls `optimizer.step()`. To serve both, the algorithm's step runs in a greenlet, a function that
can be left and continued:

1. pre-hook:  start the algorithm's step; `apply` returns here
2. torch:     the optimizer's real step, with all that others have attached to it
3. post-hook: go on behind `apply`, to the end of the algorithm's step

So algorithms are the same whoever drives them, and nothing of the optimizer is replaced:
schedulers, `GradScaler` and wrappers that hold its bound `step` reach the hooks all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import greenlet
import torch

from mpi_dasgd.training.closure import Closure

__all__ = ["StepHooks"]

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class StepHooks:
    """Hooks that make `optimizer.step` a step of the algorithm, from construction until `remove`.

    Args:
        optimizer: optimizer of this rank.
        wrap_closure: returns what is used instead of a closure of `optimizer.step`.
        make_step: makes a step of the algorithm with that closure, or with None. It calls `run`
            where the optimizer is to make its step: once, several times, or not at all.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        wrap_closure: Callable[[Callable[[], Any]], Closure],
        make_step: Callable[[Closure | None], object],
    ) -> None:
        self._optimizer = optimizer
        self._wrap_closure = wrap_closure
        self._make_step = make_step
        self._step: greenlet.greenlet | None = None  # the algorithm's step, if one has begun
        self._has_switched = False  # whether torch's own step has been used by `run`
        self._is_nested = False  # whether `run` itself has called the optimizer
        self._groups: list[dict[str, Any]] | None = None  # taken from the optimizer for one step
        # Dynamo cannot trace a switch: a compiled step leaves its graph for these two.
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
        ]

    def run(self, closure: Closure | None) -> Any:
        """Have the optimizer make its step; called by the algorithm's step, in `make_step`."""
        if self._step is greenlet.getcurrent() and not self._has_switched:
            self._has_switched = True
            self._step.parent.switch()
            return None
        self._is_nested = True
        try:
            return self._optimizer.step(*(() if closure is None else (closure,)))
        finally:
            self._is_nested = False

    def remove(self) -> None:
        """Leave the optimizer as it was before."""
        self._abandon()
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        if self._is_nested or _is_skipped(optimizer):
            return None
        self._abandon()
        args, kwargs, closure = self._wrapped(args, kwargs)
        self._has_switched = False
        self._step = greenlet.greenlet(self._make_step)
        self._step.switch(closure)
        if self._step.dead:  # no update here: the gradient was sent to where it is applied
            self._groups = optimizer.param_groups
            optimizer.param_groups = [{**group, "params": []} for group in self._groups]
        return args, kwargs

    def _after(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._is_nested or self._step is None:
            return
        self._return_groups()
        step, self._step = self._step, None
        if not step.dead:
            self._step = step  # `run` may be called again
            try:
                step.switch()
            finally:
                self._step = None

    def _wrapped(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Closure | None]:
        """Return the arguments of `optimizer.step` with its closure wrapped, and that closure."""
        if kwargs.get("closure") is not None:
            closure = self._wrap_closure(kwargs["closure"])
            return args, {**kwargs, "closure": closure}, closure
        if len(args) > 1 and callable(args[1]):
            closure = self._wrap_closure(args[1])
            return (args[0], closure, *args[2:]), kwargs, closure
        return args, kwargs, None

    def _abandon(self) -> None:
        """End a step that the optimizer, or its closure, has left by an exception."""
        self._return_groups()
        step, self._step = self._step, None
        if step is not None and not step.dead:
            step.throw()

    def _return_groups(self) -> None:
        if self._groups is not None:
            self._optimizer.param_groups, self._groups = self._groups, None


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `GradScaler` has a fused optimizer skip this step, whose gradients are inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
