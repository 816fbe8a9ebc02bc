"""Schedules over global progress and the delay-adaptive rule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.lr_schedule import NAMES, Schedule, delay_adaptive, global_progress


def test_constant_is_one_throughout() -> None:
    assert [Schedule().factor(p) for p in (0.0, 0.3, 1.0)] == [1.0, 1.0, 1.0]


def test_cosine() -> None:
    schedule = Schedule("cosine", final=0.1)
    assert schedule.factor(0.0) == pytest.approx(1.0)
    assert schedule.factor(0.5) == pytest.approx(0.55)
    assert schedule.factor(0.25) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert schedule.factor(1.0) == pytest.approx(0.1)


def test_step() -> None:
    schedule = Schedule("step", milestones=(0.5, 0.75), gamma=0.1)
    values = [schedule.factor(p) for p in (0.0, 0.499, 0.5, 0.74, 0.75, 1.0)]
    assert values == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_warmup_is_linear_and_then_leaves_the_schedule_alone() -> None:
    schedule = Schedule("constant", warmup=0.2, warmup_start=0.25)
    values = [schedule.factor(p) for p in (0.0, 0.1, 0.2, 0.9)]
    assert values == pytest.approx([0.25, 0.625, 1.0, 1.0])
    cosine = Schedule("cosine", warmup=0.2)
    assert [cosine.factor(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx(
        [0.0, 0.5, 1.0, 0.5, 0.0]
    )


@pytest.mark.parametrize("name", NAMES)
def test_factor_falls_after_warmup_and_never_leaves_its_range(name: str) -> None:
    schedule = Schedule(name, warmup=0.1, milestones=(0.4, 0.8), final=0.05)
    values = [schedule.factor(i / 200) for i in range(201)]
    assert all(0.0 <= v <= 1.0 for v in values)
    rising, falling = values[:21], values[20:]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert max(values) == pytest.approx(1.0)


def test_overrun_of_the_budget_stays_at_the_end() -> None:
    schedule = Schedule("cosine", final=0.2)
    assert schedule.factor(1.3) == schedule.factor(1.0) == pytest.approx(0.2)
    assert global_progress([700, 400], 1000) == 1.0


def test_progress_is_that_of_all_ranks() -> None:
    # One rank did nearly everything: a schedule by local steps would tell these two cases apart.
    even, uneven = [250, 250, 250, 250], [10, 970, 10, 10]
    assert global_progress(even, 2000) == global_progress(uneven, 2000) == 0.5
    schedule = Schedule("step", milestones=(0.5,))
    assert schedule.factor(global_progress(uneven, 2000)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"warmup": 500}, "divide a number of samples by the budget"),
        ({"warmup_start": 1.5}, "warmup_start"),
        ({"final": -1.0}, "final"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"name": "step"}, "needs milestones"),
        ({"name": "step", "milestones": (30.0, 60.0)}, "divide epochs"),
        ({"name": "step", "milestones": (0.6, 0.3)}, "ascending"),
        ({"name": "step", "milestones": (0.5, 0.5)}, "ascending"),
    ],
)
def test_wrong_schedules_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(**wrong)


def test_delay_adaptive_divides_by_the_delay() -> None:
    assert [delay_adaptive(d, 16) for d in (0, 1, 16)] == [1.0, 1.0, 1.0]
    assert [delay_adaptive(d, 16) for d in (17, 32)] == pytest.approx([1 / 17, 1 / 32])
    assert delay_adaptive(0, 0) == 1.0
    assert delay_adaptive(1, 0) == 1.0


def test_delay_adaptive_with_a_cap() -> None:
    assert [delay_adaptive(d, 4, cap=8.0) for d in (4, 5, 8, 16)] == [1.0, 1.0, 1.0, 0.5]
    assert delay_adaptive(5, 4, cap=4.0) == pytest.approx(0.8)  # continuous when cap = threshold
    assert delay_adaptive(5, 4, cap=0.0) == 0.0  # drops the gradient
    assert delay_adaptive(4, 4, cap=0.0) == 1.0


def test_delay_adaptive_stays_within_the_theorem() -> None:
    # The rate may not exceed min(eta, 1/(4 L delay)) beyond the threshold.
    eta, smoothness, threshold = 0.02, 3.0, 8
    cap = 1 / (4 * smoothness) / eta
    for delay in range(threshold + 1, 200):
        rate = eta * delay_adaptive(delay, threshold, cap)
        assert rate == pytest.approx(min(eta, 1 / (4 * smoothness * delay)))
        assert eta * delay_adaptive(delay, threshold) <= rate
