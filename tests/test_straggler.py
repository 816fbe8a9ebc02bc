"""Injected slowness: which ranks, by how much, repeatably."""

from __future__ import annotations

import math
import resource
import time
from statistics import NormalDist

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.config.schema import StragglerConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.straggler import Straggler, resolve_ranks


def extras(settings: StragglerConfig, rank: int, seed: int = 0, steps: int = 50) -> list[float]:
    straggler = Straggler(settings, rank, 4, seed)
    return [straggler.extra_seconds(step, 2.0) for step in range(steps)]


def test_none_slows_nobody() -> None:
    assert extras(StragglerConfig(), 0) == [0.0] * 50


def test_constant_slows_the_given_ranks_only() -> None:
    settings = StragglerConfig(distribution="constant", ranks=(-1, 1), factor=3.5)
    assert [extras(settings, rank, steps=1)[0] for rank in range(4)] == [0.0, 5.0, 0.0, 5.0]


def test_pause_comes_every_period() -> None:
    settings = StragglerConfig(distribution="pause", ranks=(), period=4, pause=0.3)
    assert extras(settings, 2, steps=9) == [0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.3, 0.0]


@pytest.mark.parametrize("distribution", ["lognormal", "exponential"])
def test_random_factors_repeat_and_differ_between_ranks_and_seeds(distribution: str) -> None:
    settings = StragglerConfig(distribution=distribution, ranks=())
    assert extras(settings, 1, seed=7) == extras(settings, 1, seed=7)
    assert extras(settings, 1, seed=7) != extras(settings, 1, seed=8)
    assert extras(settings, 1, seed=7) != extras(settings, 2, seed=7)
    # A resumed run asks for step 30 first and must get what the whole run got.
    assert Straggler(settings, 1, 4, 7).extra_seconds(30, 2.0) == extras(settings, 1, seed=7)[30]
    named = StragglerConfig(
        distribution=distribution, ranks=(-1,)
    )  # the default of the configuration
    for rank in range(4):
        assert any(extras(named, rank)) and extras(named, rank) == extras(settings, rank)


@pytest.mark.parametrize(
    ("settings", "mean_factor"),
    [
        (StragglerConfig(distribution="lognormal", sigma=0.5), 2 * NormalDist().cdf(0.25)),
        (StragglerConfig(distribution="lognormal", sigma=1.0), 2 * NormalDist().cdf(0.5)),
        (StragglerConfig(distribution="exponential"), 1 + math.exp(-1)),
    ],
)
def test_random_factors_have_the_documented_mean(
    settings: StragglerConfig, mean_factor: float
) -> None:
    draws = np.array(extras(settings, 0, steps=10_000)) / 2.0
    assert draws.min() == 0.0
    assert 1.0 + draws.mean() == pytest.approx(mean_factor, abs=4 * draws.std() / 100)


def test_extra_time_is_proportional_to_the_step() -> None:
    straggler = Straggler(StragglerConfig(distribution="exponential"), 0, 1, 0)
    slow = [straggler.extra_seconds(step, 3.0) for step in range(20)]
    fast = [straggler.extra_seconds(step, 1.0) for step in range(20)]
    assert slow == pytest.approx([3 * extra for extra in fast])


def timed(straggler: Straggler, seconds: float, **options: object) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.thread_time()
    straggler.slow_down(0, seconds, **options)  # type: ignore[arg-type]
    return time.perf_counter() - wall, time.thread_time() - cpu


def test_sleep_lasts_and_leaves_the_core_idle() -> None:
    straggler = Straggler(StragglerConfig(distribution="constant", ranks=(0,), factor=4.0), 0, 2, 0)
    wall, cpu = timed(straggler, 0.02)
    assert 0.06 <= wall < 2.0
    assert cpu < 0.03


def test_work_without_repeat_keeps_the_core_busy() -> None:
    settings = StragglerConfig(distribution="constant", ranks=(0,), factor=4.0, mode="busy")

    def given_up() -> int:  # times that this thread has given its core up itself
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    slept = []
    for _ in range(10):
        before = given_up()
        wall, _ = timed(Straggler(settings, 0, 2, 0), 0.05)
        assert wall >= 0.15
        slept.append(given_up() - before)
        if slept[-1] == 0:
            break
    # Other processes may hold the core for any time, but who sleeps gives it up each time.
    assert slept[-1] == 0, slept


def test_work_repeats_the_gradient() -> None:
    calls: list[int] = []
    settings = StragglerConfig(distribution="constant", ranks=(0,), factor=4.0, mode="busy")
    Straggler(settings, 0, 2, 0).slow_down(0, 1000.0, lambda: calls.append(1))
    assert len(calls) == 3
    Straggler(settings, 1, 2, 0).slow_down(0, 1000.0, lambda: calls.append(1))
    assert len(calls) == 3


def test_work_makes_up_for_the_fraction_of_a_factor() -> None:
    calls: list[int] = []
    settings = StragglerConfig(distribution="constant", ranks=(0,), factor=2.5, mode="busy")
    wall, _ = timed(Straggler(settings, 0, 2, 0), 0.06, repeat=lambda: calls.append(1))
    assert len(calls) == 1
    assert 0.03 <= wall < 2.0


def test_sleep_never_repeats_the_gradient() -> None:
    calls: list[int] = []
    settings = StragglerConfig(distribution="constant", ranks=(0,), factor=3.0)
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
        Straggler(StragglerConfig(distribution="constant", ranks=(4,)), 0, 4, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distribution=lognorml", "straggler.distribution.*did you mean 'lognormal'"),
        (
            "{distribution='constant',ranks=[]}",
            "straggler: distribution constant needs ranks, for example -1",
        ),
        ("mode=spin", "straggler.mode.*sleep"),
        ("factor=0.5", "straggler.factor.*greater than or equal to 1"),
        ("factor=inf", "straggler.factor.*finite"),
        ("sigma=0.0", "straggler.sigma.*greater than 0"),
        ("period=0", "straggler.period.*greater than 0"),
        ("pause=-1.0", "straggler.pause.*greater than or equal to 0"),
        ("pause=inf", "straggler.pause.*finite"),
    ],
)
def test_settings_out_of_range_are_refused(override: str, message: str) -> None:
    separator = "=" if override.startswith("{") else "."
    with pytest.raises(UserError, match=message):
        config.load(None, [f"straggler{separator}{override}"])
