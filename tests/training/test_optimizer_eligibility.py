"""Which optimizers are served in a pass, and which steps torch makes itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.closure import Closure
from tests.support.optimizer_pair import OptimizerPair

MOMENTUM = {"lr": 0.1, "momentum": 0.9}


class Subclass(SGD):
    """An optimizer of a user's, whose step does more."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)


def hook(*_: Any) -> None:
    """Do nothing."""


def replace_step(optimizer: Any) -> None:
    """Wrap the step of an object, as accelerate does."""
    own = optimizer.step
    optimizer.step = lambda *args: own(*args)


def set_on_group(**settings: Any) -> Callable[[Any], None]:
    """Return a function that changes the settings of the first group."""
    return lambda optimizer: optimizer.param_groups[0].update(settings)


def gradient_of_scaler(optimizer: Any) -> None:
    """Do what `GradScaler` does with an optimizer that divides the gradients itself."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pre-hook": (lambda o: o.register_step_pre_hook(hook), "step hook"),
    "post-hook": (lambda o: o.register_step_post_hook(hook), "step hook"),
    "replaced step": (replace_step, "step has been replaced"),
    "tensor momentum": (set_on_group(momentum=torch.tensor(0.9)), "not all numbers"),
    "differentiable": (set_on_group(differentiable=True), "differentiable"),
    "rate with a gradient": (
        set_on_group(lr=torch.tensor(0.1, requires_grad=True)),
        "learning rate is a tensor",
    ),
    "rate in an array": (set_on_group(lr=np.array(0.1)), "learning rate is an array"),
    "beyond float32": (set_on_group(weight_decay=1e60), "too large"),
    "scaler": (gradient_of_scaler, "GradScaler"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_torch_makes_a_step_that_has_more_to_it(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = CHANGES[name]
    pair = OptimizerPair(SGD, MOMENTUM)
    pair.step()
    change(pair.optimizer)
    with caplog.at_level(logging.DEBUG, "mpi_dasgd"):
        pair.set_gradients()
        pair.local.begin_step(None)
        assert pair.local.fused_update() is None
        assert pair.local.fused_update() is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "it is said once"
    assert reason in said[0]


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.5), (1e200, 0.9)])
def test_torch_makes_a_step_of_adam_that_has_no_scalars(betas: tuple[float, float]) -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.step()
    pair.step()
    pair.optimizer.param_groups[0]["betas"] = betas
    pair.set_gradients()
    pair.local.begin_step(None)
    assert pair.local.fused_update() is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])  # the first is as large as float32
def test_torch_makes_a_step_of_gradients_of_another_type(dtype: torch.dtype) -> None:
    pair = OptimizerPair(SGD, MOMENTUM)
    pair.step()
    for optimizer in (pair.optimizer, pair.reference):
        p = optimizer.param_groups[0]["params"][0]
        p.grad_dtype = None  # any
    pair.set_gradients()
    for optimizer in (pair.optimizer, pair.reference):
        p = optimizer.param_groups[0]["params"][0]
        p.grad = torch.full(p.shape, 10 / 7, dtype=torch.float64).to(dtype)
    pair.reference.step()
    pair.parameters.gather()
    pair.local.begin_step(None)
    pair.local.apply()
    assert pair.torchs_steps == 1
    pair.require_equal()


def test_hooks_and_patches_may_go_again() -> None:
    pair = OptimizerPair(SGD, MOMENTUM)
    handle = pair.optimizer.register_step_post_hook(hook)
    pair.step(torchs=True)
    handle.remove()
    pair.step()
    handle = register_optimizer_step_post_hook(hook)
    pair.step(torchs=True)
    handle.remove()
    pair.step()
    replace_step(pair.optimizer)
    pair.step(torchs=True)
    del pair.optimizer.step
    pair.step()
    pair.require_equal()


def test_a_class_whose_step_is_replaced_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = OptimizerPair(AdamW, {"lr": 0.01})
    pair.step()
    own = AdamW.step

    def step(self: Any, closure: Any = None) -> Any:
        return own(self, closure)

    monkeypatch.setattr(AdamW, "step", step)
    pair.set_gradients()
    pair.local.begin_step(None)
    assert pair.local.fused_update() is None


@pytest.mark.parametrize(
    ("kind", "options"), [(Subclass, MOMENTUM), (torch.optim.RMSprop, {"lr": 0.1})]
)
def test_other_optimizers_are_torchs(kind: Any, options: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    pair = OptimizerPair.__new__(OptimizerPair)
    pair.set_up(model, kind(model.parameters(), **options))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    pair.local.begin_step(None)
    assert pair.local.fused_update() is None
    pair.local.apply()
    assert pair.torchs_steps == 1


def test_a_closure_is_evaluated_by_torch() -> None:
    pair = OptimizerPair(SGD, MOMENTUM)
    pair.set_gradients()
    losses: list[float] = []

    def closure() -> float:
        losses.append(0.5)
        return 0.5

    pair.local.begin_step(Closure(closure, "adpsgd"))
    assert pair.local.fused_update() is None
    pair.local.apply()
    assert pair.torchs_steps == 1
    pair.local.apply()  # a second update of the step has none
    assert pair.torchs_steps == 1
    assert len(losses) == 1


def test_sparse_gradients_are_torchs() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    pair = OptimizerPair.__new__(OptimizerPair)
    pair.set_up(model, SGD(model.parameters(), lr=0.5))
    model(torch.tensor([1])).sum().backward()
    before = model.weight.detach().clone()
    pair.local.begin_step(None)
    pair.local.apply()
    assert pair.torchs_steps == 1
    assert torch.equal((before - model.weight).sum(1), torch.tensor([0.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_parameters_of_other_types_are_torchs(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2, dtype=dtype)
    pair = OptimizerPair.__new__(OptimizerPair)
    pair.set_up(model, Adam(model.parameters(), lr=0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    pair.local.begin_step(None)
    pair.local.apply()
    assert pair.torchs_steps == 1
    assert [state["step"].item() for state in pair.optimizer.state.values()] == [1.0, 1.0]


def test_errors_of_torch_stay_those_of_torch() -> None:
    pair = OptimizerPair(Adam, {"lr": 0.01})
    pair.step()
    pair.optimizer.param_groups[0]["amsgrad"] = True  # after its state was made
    pair.set_gradients()
    pair.local.begin_step(None)
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        pair.local.apply()
    del pair.optimizer.param_groups[0]["lr"]
    with pytest.raises((KeyError, UserError)):
        pair.local.apply(0.5)
