"""Learning-rate schedules over global progress."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from mpi_dasgd import config
from mpi_dasgd.config.schema import ScheduleConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.lr_schedule import Schedule


def schedule(name: str = "constant", **keys: Any) -> Schedule:
    return Schedule(ScheduleConfig.model_validate({"name": name, **keys}))


def test_constant_is_one_throughout() -> None:
    assert [schedule().factor(p) for p in (0.0, 0.3, 1.0)] == [1.0, 1.0, 1.0]


def test_a_schedule_says_whether_progress_matters() -> None:
    assert schedule().is_constant
    assert not schedule(warmup=0.1).is_constant
    assert not schedule("cosine").is_constant and not schedule("step").is_constant


def test_cosine() -> None:
    cosine = schedule("cosine", end_factor=0.1)
    assert cosine.factor(0.0) == pytest.approx(1.0)
    assert cosine.factor(0.5) == pytest.approx(0.55)
    assert cosine.factor(0.25) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert cosine.factor(1.0) == pytest.approx(0.1)


def test_step() -> None:
    step = schedule("step", milestones=(0.5, 0.75), gamma=0.1)
    values = [step.factor(p) for p in (0.0, 0.499, 0.5, 0.74, 0.75, 1.0)]
    assert values == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_warmup_is_linear_and_then_leaves_the_schedule_alone() -> None:
    constant = schedule("constant", warmup=0.2, warmup_start_factor=0.25)
    values = [constant.factor(p) for p in (0.0, 0.1, 0.2, 0.9)]
    assert values == pytest.approx([0.25, 0.625, 1.0, 1.0])
    cosine = schedule("cosine", warmup=0.2, warmup_start_factor=0.0)
    assert [cosine.factor(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.0]
    )


@pytest.mark.parametrize("name", get_args(ScheduleConfig.model_fields["name"].annotation))
def test_factor_falls_after_warmup_and_never_leaves_its_range(name: str) -> None:
    warmed = schedule(
        name, warmup=0.1, warmup_start_factor=0.0, milestones=(0.4, 0.8), end_factor=0.05
    )
    values = [warmed.factor(i / 200) for i in range(201)]
    assert all(0.0 <= v <= 1.0 for v in values)
    rising, falling = values[:21], values[20:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert max(values) == pytest.approx(1.0)


def test_overrun_of_the_budget_stays_at_the_end() -> None:
    cosine = schedule("cosine", end_factor=0.2)
    assert cosine.factor(1.3) == cosine.factor(1.0) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (".name=cosin", "schedule.name.*did you mean 'cosine'"),
        (".warmup=1.0", "warmup is a share .* divide a number of samples by the budget"),
        (".warmup=-0.1", "schedule.warmup.*greater than or equal to 0"),
        (".warmup=500", "schedule.warmup.*less than or equal to 1, got 500"),
        (".warmup_start_factor=1.5", "schedule.warmup_start_factor.*less than or equal to 1"),
        (".end_factor=-1.0", "schedule.end_factor.*greater than or equal to 0"),
        (".gamma=0.0", "schedule.gamma.*greater than 0"),
        (".gamma=nan", "schedule.gamma.*"),
        (".gamma=inf", "schedule.gamma.*finite"),
        ("={name='step',milestones=[]}", "schedule: schedule step needs milestones"),
        ("={name='step',milestones=[30.0,60.0]}", "schedule.milestones.*less than or equal to 1"),
        ("={name='step',milestones=[0.5,1.0]}", "schedule: milestones.*divide epochs"),
        ("={name='step',milestones=[0.6,0.3]}", "schedule: milestones.*ascending"),
        ("={name='step',milestones=[0.5,0.5]}", "schedule: milestones.*ascending"),
    ],
)
def test_settings_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(None, [f"schedule{override}"])
