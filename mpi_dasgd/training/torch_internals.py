"""What steps need of torch's internals, in all versions that are supported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

__all__ = ["increment_versions", "set_compiler"]


def set_compiler(compiler: Any) -> Any:
    """Set what compiles the frames of this thread (None: nothing), and return what did.

    Without effect where torch does not let it be set.
    """
    return compiler if _set_eval_frame is None else _set_eval_frame(compiler)


def increment_versions(tensors: Sequence[torch.Tensor]) -> None:
    """Note that tensors were changed in place: what backward has saved of them is stale."""
    if _TAKES_LISTS:
        increment_version(tensors)
    else:
        for tensor in tensors:
            increment_version(tensor)


def _eval_frame_setter() -> Any:
    try:
        setter: Any = torch._C._dynamo.eval_frame.set_eval_frame
        setter(setter(None))
    except (AttributeError, TypeError):
        return None
    return setter


def _takes_lists() -> bool:
    try:
        increment_version([])
    except (TypeError, RuntimeError):  # before torch 2.6
        return False
    return True


_set_eval_frame = _eval_frame_setter()
_TAKES_LISTS = _takes_lists()
