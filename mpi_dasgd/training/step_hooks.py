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

import inspect
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import greenlet
import torch

from mpi_dasgd.training.closure import Closure
from mpi_dasgd.training.torch_internals import set_compiler

__all__ = ["StepHooks"]

_OPTIMIZER_FILE = inspect.getfile(torch.optim.Optimizer)
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
        self._maker: greenlet.greenlet | None = None  # makes the steps, one after the other
        self._thread = 0  # to which it belongs
        self._call: FrameType | None = None  # call of the optimizer's step that it makes one of
        self._is_waiting = False  # whether `run` waits for that call
        self._has_waited = False
        self._is_nested = False  # whether `run` itself has called the optimizer
        self._groups: list[dict[str, Any]] | None = None  # taken from the optimizer for one step
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def run(self, closure: Closure | None) -> Any:
        """Have the optimizer make its step; called by the algorithm's step, in `make_step`."""
        if self._call is not None and not self._has_waited:
            self._is_waiting = self._has_waited = True
            self._return_control()
            self._is_waiting = False
            return None
        self._is_nested = True
        try:
            return self._optimizer.step(*(() if closure is None else (closure,)))
        finally:
            self._is_nested = False

    def remove(self) -> None:
        """Leave the optimizer as it was before."""
        self._abandon()
        if self._maker is not greenlet.getcurrent():
            self._maker = None  # one that can go on is found by no garbage collection
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        call = _call_of_optimizer()
        if self._is_nested or _is_skipped(optimizer) or self._is_inner(call):
            return None
        self._abandon()
        args, kwargs, closure = self._wrapped(args, kwargs)
        self._call = call
        self._has_waited = False
        self._continue(closure)
        if not self._is_waiting:  # no update here: the gradient was sent to where it is applied
            self._groups = optimizer.param_groups
            optimizer.param_groups = [{**group, "params": []} for group in self._groups]
        return args, kwargs

    def _after(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._is_nested or self._call is None or _call_of_optimizer() is not self._call:
            return
        self._return_groups()
        try:
            if self._is_waiting:
                self._continue(None)
        finally:
            self._call = None

    def _continue(self, closure: Closure | None) -> None:
        """Let the algorithm begin a step with `closure`, or go on with the one that waits."""
        thread = threading.get_ident()
        if self._maker is None or self._maker.dead or self._thread != thread:
            self._maker, self._thread = greenlet.greenlet(self._make_steps), thread
        self._maker.parent = greenlet.getcurrent()  # where `switch` returns to
        compiler = set_compiler(None)  # where users compile steps, algorithms stay as they are
        try:
            self._maker.switch(closure)
        finally:
            set_compiler(compiler)

    def _make_steps(self, closure: Closure | None) -> None:
        # A greenlet that is used again: a new one takes 8 us.
        while True:
            self._make_step(closure)
            closure = self._return_control()

    def _return_control(self) -> Closure | None:
        """Go on where `_continue` was called; return what it is called with next."""
        assert self._maker is not None
        closure: Closure | None = self._maker.parent.switch()
        return closure

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
        maker, self._call = self._maker, None
        if self._is_waiting and maker is not None:
            self._is_waiting, self._maker = False, None
            maker.parent = greenlet.getcurrent()
            maker.throw()

    def _is_inner(self, call: FrameType | None) -> bool:
        """Return whether `call` is within the step that has begun: a subclass calls its base's."""
        while self._call is not None and call is not None:
            if call is self._call:
                return True
            call = call.f_back
        return False

    def _return_groups(self) -> None:
        if self._groups is not None:
            self._optimizer.param_groups, self._groups = self._groups, None


def _call_of_optimizer() -> FrameType | None:
    """Return the frame in which torch calls the hook that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _OPTIMIZER_FILE:
        frame = frame.f_back
    return frame


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `GradScaler` has a fused optimizer skip this step, whose gradients are inf."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
