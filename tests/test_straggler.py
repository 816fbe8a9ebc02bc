"""Injected slowness: who, by how much, repeatably; and the compute times of the virtual clock."""

from __future__ import annotations

import math
import time
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.straggler import (
    TIME_KINDS,
    ComputeTimes,
    Straggler,
    StragglerSettings,
    resolve_ranks,
)


def extras(settings: StragglerSettings, rank: int, seed: int = 0, steps: int = 50) -> list[float]:
    straggler = Straggler(settings, rank, 4, seed)
    return [straggler.extra_seconds(step, 2.0) for step in range(steps)]


def test_none_slows_nobody() -> None:
    assert extras(StragglerSettings(), 0) == [0.0] * 50


def test_constant_slows_the_given_ranks_only() -> None:
    settings = StragglerSettings("constant", ranks=(-1, 1), factor=3.5)
    assert [extras(settings, rank, steps=1)[0] for rank in range(4)] == [0.0, 5.0, 0.0, 5.0]


def test_pause_comes_every_period() -> None:
    settings = StragglerSettings("pause", period=4, pause=0.3)
    assert extras(settings, 2, steps=9) == [0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.3, 0.0]


@pytest.mark.parametrize("kind", ["lognormal", "exponential"])
def test_random_kinds_repeat_and_differ_between_ranks_and_seeds(kind: str) -> None:
    settings = StragglerSettings(kind)
    assert extras(settings, 1, seed=7) == extras(settings, 1, seed=7)
    assert extras(settings, 1, seed=7) != extras(settings, 1, seed=8)
    assert extras(settings, 1, seed=7) != extras(settings, 2, seed=7)
    # A resumed run asks for step 30 first and must get what the whole run got.
    assert Straggler(settings, 1, 4, 7).extra_seconds(30, 2.0) == extras(settings, 1, seed=7)[30]
    named = StragglerSettings(kind, ranks=(-1,))  # the default of the configuration
    for rank in range(4):
        assert any(extras(named, rank)) and extras(named, rank) == extras(settings, rank)


@pytest.mark.parametrize(
    ("settings", "mean_factor"),
    [
        (StragglerSettings("lognormal", sigma=0.5), 2 * NormalDist().cdf(0.25)),
        (StragglerSettings("lognormal", sigma=1.0), 2 * NormalDist().cdf(0.5)),
        (StragglerSettings("exponential"), 1 + math.exp(-1)),
    ],
)
def test_random_kinds_have_the_documented_mean(
    settings: StragglerSettings, mean_factor: float
) -> None:
    draws = np.array(extras(settings, 0, steps=10_000)) / 2.0
    assert draws.min() == 0.0
    assert 1.0 + draws.mean() == pytest.approx(mean_factor, abs=4 * draws.std() / 100)


def test_extra_time_is_proportional_to_the_step() -> None:
    straggler = Straggler(StragglerSettings("exponential"), 0, 1, 0)
    slow = [straggler.extra_seconds(step, 3.0) for step in range(20)]
    fast = [straggler.extra_seconds(step, 1.0) for step in range(20)]
    assert slow == pytest.approx([3 * extra for extra in fast])


def timed(straggler: Straggler, seconds: float, **options: object) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    straggler.slow_down(0, seconds, **options)  # type: ignore[arg-type]
    return time.perf_counter() - wall, time.thread_time() - cpu


def test_sleep_lasts_and_leaves_the_core_idle() -> None:
    straggler = Straggler(StragglerSettings("constant", ranks=(0,), factor=4.0), 0, 2, 0)
    wall, cpu = timed(straggler, 0.02)
    assert 0.06 <= wall < 2.0
    assert cpu < 0.03


def test_work_without_repeat_keeps_the_core_busy() -> None:
    settings = StragglerSettings("constant", ranks=(0,), factor=4.0, mode="work")
    wall, cpu = timed(Straggler(settings, 0, 2, 0), 0.05)
    assert 0.15 <= wall < 3.0
    # Other processes may hold the core for a while, but sleeping would use almost nothing.
    assert cpu > 0.02


def test_work_repeats_the_gradient() -> None:
    calls: list[int] = []
    settings = StragglerSettings("constant", ranks=(0,), factor=4.0, mode="work")
    Straggler(settings, 0, 2, 0).slow_down(0, 1000.0, lambda: calls.append(1))
    assert len(calls) == 3
    Straggler(settings, 1, 2, 0).slow_down(0, 1000.0, lambda: calls.append(1))
    assert len(calls) == 3


def test_work_makes_up_for_the_fraction_of_a_factor() -> None:
    calls: list[int] = []
    settings = StragglerSettings("constant", ranks=(0,), factor=2.5, mode="work")
    wall, _ = timed(Straggler(settings, 0, 2, 0), 0.06, repeat=lambda: calls.append(1))
    assert len(calls) == 1
    assert 0.03 <= wall < 2.0


def test_sleep_never_repeats_the_gradient() -> None:
    calls: list[int] = []
    settings = StragglerSettings("constant", ranks=(0,), factor=3.0)
    Straggler(settings, 0, 1, 0).slow_down(0, 0.001, lambda: calls.append(1))
    assert calls == []


def test_resolve_ranks() -> None:
    assert resolve_ranks((-1, 0, 7), 8) == {0, 7}
    for rank in (8, -9):
        with pytest.raises(
            UserError, match=f"rank {rank} does not exist: with 8 ranks use -8 to 7"
        ):
            resolve_ranks((rank,), 8)
    with pytest.raises(UserError, match="rank 4"):
        Straggler(StragglerSettings("constant", ranks=(4,)), 0, 4, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "lognorml"}, "did you mean 'lognormal'"),
        ({"kind": "constant"}, "needs ranks"),
        ({"mode": "spin"}, "sleep, work"),
        ({"factor": 0.5}, "at least 1"),
        ({"factor": math.inf}, "at least 1"),
        ({"sigma": 0.0}, "sigma"),
        ({"period": 0}, "period"),
        ({"pause": -1.0}, "pause"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StragglerSettings(**wrong)


@pytest.mark.parametrize("kind", TIME_KINDS)
def test_compute_times_have_their_mean(kind: str) -> None:
    times = ComputeTimes(kind, mean=0.2, sigma=0.6, slow_ranks=frozenset({3}), slow_factor=10.0)
    rng = np.random.default_rng(1)
    normal = np.array([times.draw(0, rng) for _ in range(10_000)])
    slow = np.array([times.draw(3, rng) for _ in range(10_000)])
    assert normal.min() > 0.0
    assert normal.mean() == pytest.approx(0.2, abs=4 * normal.std() / 100 + 1e-12)
    assert slow.mean() == pytest.approx(2.0, abs=4 * slow.std() / 100 + 1e-12)
    spread = {
        "constant": 0.0,
        "uniform": 0.2 / math.sqrt(12),
        "lognormal": 0.2 * math.sqrt(math.exp(0.36) - 1),
        "exponential": 0.2,
    }[kind]
    assert normal.std() == pytest.approx(spread, rel=0.06, abs=1e-12)


def test_uniform_compute_times_keep_to_their_bounds() -> None:
    rng = np.random.default_rng(0)
    draws = [ComputeTimes("uniform", mean=2.0).draw(0, rng) for _ in range(1000)]
    assert 1.0 <= min(draws) < 1.05 and 2.95 < max(draws) <= 3.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "normal"}, "did you mean 'lognormal'"),
        ({"mean": 0.0}, "mean compute time"),
        ({"sigma": -1.0}, "sigma"),
        ({"slow_factor": 0.5}, "slow_factor"),
        ({"slow_ranks": frozenset({-1})}, "resolve_ranks"),
    ],
)
def test_wrong_compute_times_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ComputeTimes(**wrong)
