"""Whether torch's own step of an optimizer can be replaced by one that is made in a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

__all__ = ["SERVED", "Eligibility"]

SERVED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Classes whose steps are made in a pass; of a subclass nobody knows what its step does."""

_TORCH_OPTIM = f"{Path(torch_optimizer.__file__).parent}/"
_OWN = __name__.partition(".")[0]
_GLOBAL_HOOKS: tuple[Any, ...] = tuple(
    getattr(torch_optimizer, name, ("unknown",))  # of a torch that has them elsewhere
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
)


class Eligibility:
    """What about an optimizer forbids to make its step for it, at present.

    Args:
        optimizer: an optimizer; none of its tensors are looked at.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._class = type(optimizer)
        self._steps: tuple[object, object] = (None, None)  # looked at: class's, and its own
        self._step_obstacle = "it has not been looked at"
        self._hooks: tuple[list[int], list[int]] = ([], [])  # looked at, by their ids
        self._hook_obstacle = ""

    def obstacle(self) -> str:
        """Return why torch must make its own step; empty: it need not. Called in every step."""
        optimizer: Any = self._optimizer
        own = optimizer.__dict__
        if type(optimizer) is not self._class or self._class not in SERVED:
            return f"it is a {type(optimizer).__name__}, none of SGD, Adam and AdamW"
        steps = self._class.step, own.get("step")
        if steps[0] is not self._steps[0] or steps[1] is not self._steps[1]:
            is_torchs = _is_torchs(steps[0]) and (steps[1] is None or _is_torchs(steps[1]))
            self._steps = steps
            self._step_obstacle = "" if is_torchs else "its step has been replaced"
        if self._step_obstacle:
            return self._step_obstacle
        before, after = own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]
        if [*before] != self._hooks[0] or [*after] != self._hooks[1]:
            self._hooks = [*before], [*after]
            strangers = [h for h in (*before.values(), *after.values()) if not _is_ours(h)]
            self._hook_obstacle = f"it has the step hook {strangers[0]!r}" if strangers else ""
        if self._hook_obstacle:
            return self._hook_obstacle
        if any(_GLOBAL_HOOKS):
            return "all optimizers have step hooks"
        if own.get("grad_scale") is not None or own.get("found_inf") is not None:
            return "GradScaler has its fused step divide the gradients"
        return ""


def _is_torchs(function: Any) -> bool:
    """Return whether a step is torch's, with nothing but torch's wrappers around it."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCH_OPTIM):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _is_ours(hook: Any) -> bool:
    """Return whether a hook is one of this package."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == _OWN
