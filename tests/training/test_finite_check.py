"""A model on a device that becomes infinite or NaN is found a step later, without waiting."""

from __future__ import annotations

import math
import time

import pytest
import torch

from mpi_dasgd.errors import Diverged
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.finite_check import LateFiniteCheck
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from tests.support.late_device import LateDevice


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_answer_comes_when_the_device_has_come_so_far(value: float) -> None:
    vector = torch.ones(3000)
    device = LateDevice((0.05, 0.05))
    check = LateFiniteCheck(vector, device)
    assert check.failed_step(wait=True) is None  # nothing was asked
    check.begin(1)
    assert check.failed_step() is None
    vector[2000] = value
    check.begin(2)  # it has no answer of step 1 yet, and leaves this one out
    assert check.failed_step(wait=True) is None
    check.begin(3)
    assert check.failed_step() is None
    time.sleep(0.2)
    assert check.failed_step() == 3
    assert check.failed_step() is None  # once
    device.close()


def _local(check_finite: bool = True) -> tuple[torch.nn.Module, TorchLocalOptimizer]:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = FlatParameters(model, optimizer, LateDevice((0, 0)))
    return model, TorchLocalOptimizer(optimizer, parameters, 3, check_finite=check_finite)


def _step(model: torch.nn.Module, local: TorchLocalOptimizer, value: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    local.begin_step(None)
    local.apply()


def test_an_update_is_refused_in_the_step_after_it() -> None:
    model, local = _local()
    _step(model, local, 1.0)
    _step(model, local, math.inf)
    with pytest.raises(Diverged, match=r"rank 3, step 2: parameter weight .* one step late"):
        _step(model, local, 1.0)


def test_the_last_update_is_refused_at_the_end() -> None:
    model, local = _local()
    _step(model, local, math.inf)
    with pytest.raises(Diverged, match="step 1: parameter weight"):
        local.require_finite_updates()
    local.require_finite_updates()


def test_what_the_user_writes_is_refused_before_others_see_it() -> None:
    model, local = _local()
    _step(model, local, 1.0)
    with torch.no_grad():
        model.bias.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(Diverged, match="step 1: parameter bias became nan .* no other rank"):
        local.require_finite_model()


def test_nothing_is_looked_at_if_the_user_says_so() -> None:
    model, local = _local(check_finite=False)
    for _ in range(3):
        _step(model, local, math.nan)
    local.require_finite_model()
    local.require_finite_updates()
