"""The local optimizer: rates that are the user's, and what is refused, on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.errors import Diverged, UserError
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer


def _local(
    kind: Any = torch.optim.SGD, **options: Any
) -> tuple[torch.nn.Module, torch.optim.Optimizer, TorchLocalOptimizer]:
    model = torch.nn.Linear(2, 1)
    optimizer = kind(model.parameters(), **options)
    return model, optimizer, TorchLocalOptimizer(optimizer, FlatParameters(model, optimizer), 3)


def _step(model: torch.nn.Module, local: TorchLocalOptimizer, value: float = 1.0) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    local.begin_step(None)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_a_factor_holds_for_one_step(lr: Any) -> None:
    model, optimizer, local = _local(lr=lr)
    assert local.lr == pytest.approx(0.1)
    before = model.bias.item()  # type: ignore[union-attr, operator]
    local.lr_scale = 0.5
    _step(model, local)
    local.apply(0.5)
    assert model.bias.item() == pytest.approx(before - 0.025)  # type: ignore[union-attr, operator]
    assert local.lr == pytest.approx(0.025)
    assert optimizer.param_groups[0]["lr"] is lr


def test_a_rate_that_a_hook_sets_stays() -> None:
    model, optimizer, local = _local(lr=0.1)
    optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=0.3))
    local.lr_scale = 0.5
    _step(model, local)
    local.apply()
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_an_exception_of_the_optimizer_returns_the_rate() -> None:
    model, optimizer, local = _local(lr=0.1)

    def fail(*_: Any) -> None:
        raise ValueError("hook")

    optimizer.register_step_pre_hook(fail)
    local.lr_scale = 0.5
    _step(model, local)
    with pytest.raises(ValueError, match="hook"):
        local.apply()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not local.is_updating


class _WithoutRate(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad)


def test_an_optimizer_without_rate_works_until_the_rate_is_scaled() -> None:
    model, _, local = _local(_WithoutRate)
    _step(model, local)
    local.apply()
    assert local.lr == 0.0
    with pytest.raises(UserError, match="_WithoutRate have no 'lr'"):
        local.apply(0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model, _, local = _local(lr=0.1)
    _step(model, local, value)
    with pytest.raises(Diverged, match=r"rank 3, step 1: parameter weight became .*\(3 elements"):
        local.apply()
    model, _, local = _local(lr=0.1)
    _step(model, local)
    model.bias.grad[0] = value  # type: ignore[union-attr, operator, index]
    with pytest.raises(Diverged, match=r"rank 3, step 1: gradient of bias became .*\(1 elements"):
        _ = local.gradient


@pytest.mark.filterwarnings("error")
def test_large_values_are_finite() -> None:
    model, _, local = _local(lr=1e-3)
    _step(model, local, 1e30)  # whose square is not, in float32
    assert np.isfinite(local.gradient).all()
    local.apply()
    local._check_finite = False
    _step(model, local, np.nan)
    local.apply()


def test_gradients_of_a_fused_step_are_unscaled_before_they_are_exchanged() -> None:
    model, optimizer, local = _local(torch.optim.AdamW, fused=True)
    _step(model, local, 8.0)
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    assert set(local.gradient[:3].tolist()) == {2.0}
    assert optimizer.grad_scale is None  # type: ignore[attr-defined]
