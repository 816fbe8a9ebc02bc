"""A model on a device that becomes infinite or NaN is found a step later, without waiting."""

from __future__ import annotations

import math
import time

import pytest
import torch

from mpi_dasgd.device.run_ahead import RunAhead
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
    for step in (2, 3, 4):  # it has no answer yet, and need not give all
        check.begin(step)
        assert check.failed_step() is None
    time.sleep(0.3)
    assert check.failed_step() == 3
    assert check.failed_step(wait=True) is None  # once
    device.close()


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_newest_step_is_asked_however_late_the_device_is(steps: int) -> None:
    vector = torch.ones(10)
    device = LateDevice((0.02, 0.02))
    check = LateFiniteCheck(vector, device)
    for step in range(1, steps):
        check.begin(step)
    vector[3] = math.nan
    check.begin(steps)
    assert check.failed_step(wait=True) == steps
    device.close()


def _local(
    check_finite: bool = True, delay: float = 0.0
) -> tuple[torch.nn.Module, TorchLocalOptimizer]:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = FlatParameters(model, optimizer, LateDevice((delay, delay)))
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


def test_updates_before_an_exchange_are_refused_before_it() -> None:
    """The host waits for the device before it claims; by then it can know of all steps before."""
    model, local = _local(delay=0.01)
    ahead = RunAhead(local.device)
    ahead.on_caught_up = local.refuse_known_updates
    for value in (1.0, 1.0, math.inf, 1.0):  # local steps, and the one that exchanges
        ahead.begin_step()
        _step(model, local, value)
    with pytest.raises(Diverged, match="step 3: parameter weight"):
        ahead.catch_up()
    local.device.close()


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_the_last_update_is_refused_at_the_end(delay: float) -> None:
    model, local = _local(delay=delay)
    _step(model, local, 1.0)
    _step(model, local, 1.0)
    _step(model, local, math.inf)
    with pytest.raises(Diverged, match="step 3: parameter weight"):
        local.require_finite_updates()
    local.require_finite_updates()
    local.device.close()


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
