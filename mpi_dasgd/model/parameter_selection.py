"""Which parameters a run trains: those of the module and of its optimizer, refused by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.parameter import is_lazy

from mpi_dasgd.errors import UserError

__all__ = ["optimizer_parameters", "require_supported", "select_parameters"]

TRAINABLE = {
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
}
"""Types of parameters that can be trained."""


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Return all parameters of `optimizer`, by their place in it."""
    return [
        (f"optimizer.param_groups[{group}]['params'][{index}]", p)
        for group, settings in enumerate(optimizer.param_groups)
        for index, p in enumerate(settings["params"])
    ]


def select_parameters(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters that are exchanged, by name.

    These are the parameters of `module` that require a gradient or belong to the optimizer, so that
    they can be unfrozen later, and those of the optimizer that `module` does not have. Integers can
    never be trained and are not among them.

    Args:
        module: the model.
        optimizer: its optimizer; None: only the parameters that require a gradient.

    Returns:
        Name and parameter: first those of the module in its order, then the others under their
        place in the optimizer. A parameter with several names is there once, under the first.

    Raises:
        UserError: a parameter or the optimizer cannot be trained; see `require_supported`.
    """
    of_optimizer = [] if optimizer is None else optimizer_parameters(optimizer)
    in_optimizer = {id(p) for _, p in of_optimizer}
    selected: dict[int, tuple[str, torch.Tensor]] = {}
    in_module = False
    for name, p in module.named_parameters():
        if is_lazy(p):
            require_supported(name, p)
        if p.requires_grad or (id(p) in in_optimizer and _is_trainable(p)):
            selected[id(p)] = (name, p)
            in_module = in_module or id(p) in in_optimizer or optimizer is None
    if not selected:
        raise UserError(
            f"model: {type(module).__name__} has no trainable parameters: all of them are frozen "
            "(requires_grad=False), or it has none"
        )
    if not in_module:
        raise UserError(
            f"optimizer: it has none of the trainable parameters of the model "
            f"({type(module).__name__}), so that nothing would be trained; make it of this very "
            "object: optimizer = torch.optim.SGD(model.parameters(), ...), after copying or moving "
            "the model"
        )
    for place, tensor in of_optimizer:
        if tensor.requires_grad or _is_trainable(tensor):
            selected.setdefault(id(tensor), (place, tensor))
    named = list(selected.values())
    for name, tensor in named:
        require_supported(name, tensor)
    _require_one_device(named)
    return named


def _is_trainable(p: torch.Tensor) -> bool:
    return p.is_floating_point() or p.is_complex()


def require_supported(name: str, p: torch.Tensor) -> None:
    """Refuse a parameter that cannot be part of a vector of real numbers.

    Args:
        name: its name, for the message.
        p: the parameter.

    Raises:
        UserError: it has no values yet (lazy or meta), no memory of its own (sparse, distributed
            and other subclasses of Tensor), or a type that is not in `TRAINABLE`.
    """
    problem = ""
    if is_lazy(p):
        problem = "is not initialized (a lazy module): run one batch through the model before"
    elif p.is_meta:
        problem = "is on the meta device and has no values: model.to_empty(device=...) and set them"
    elif p.layout != torch.strided:
        problem = f"has the layout {p.layout}, expected torch.strided (dense)"
    elif type(p).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        problem = (
            f"is a {type(p).__name__}, expected an ordinary tensor: models that are sharded or "
            "quantized by other means cannot be exchanged"
        )
    elif p.dtype not in TRAINABLE:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in TRAINABLE))
        problem = f"is {p.dtype}, expected one of {names}"
    if problem:
        raise UserError(f"model: parameter {name} {problem}")


def _require_one_device(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    first: dict[torch.device, str] = {}
    for name, p in named:
        first.setdefault(p.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in first.items())
        raise UserError(
            f"model: parameters are on several devices ({places}), expected one: move them "
            "together before"
        )
