"""Compute times of the virtual clock."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.config.schema import SimulationConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.compute_times import ComputeTimes
from mpi_dasgd.simulation.simulator import Simulator
from tests.support.virtual_ranks import JOB


@pytest.mark.parametrize("distribution", ["constant", "uniform", "lognormal", "exponential"])
def test_compute_times_have_their_mean(distribution: str) -> None:
    times = ComputeTimes(
        SimulationConfig.model_validate(
            {
                "ranks": 4,
                "compute_time": distribution,
                "compute_mean": 0.2,
                "compute_sigma": 0.6,
                "slow_ranks": (-1,),
                "slow_factor": 10.0,
            }
        )
    )
    rng = np.random.default_rng(1)
    normal = np.array([times.draw(0, rng) for _ in range(10_000)])
    slow = np.array([times.draw(3, rng) for _ in range(10_000)])
    assert normal.min() > 0.0
    assert normal.mean() == pytest.approx(0.2, abs=4 * normal.std() / 100 + 1e-12)
    assert slow.mean() == pytest.approx(2.0, abs=4 * slow.std() / 100 + 1e-12)
    deviation = {
        "constant": 0.0,
        "uniform": 0.2 / math.sqrt(12),
        "lognormal": 0.2 * math.sqrt(math.exp(0.36) - 1),
        "exponential": 0.2,
    }[distribution]
    assert normal.std() == pytest.approx(deviation, rel=0.06, abs=1e-12)


def test_uniform_compute_times_keep_to_their_bounds() -> None:
    rng = np.random.default_rng(0)
    times = ComputeTimes(SimulationConfig(compute_time="uniform", compute_mean=2.0))
    draws = [times.draw(0, rng) for _ in range(1000)]
    assert 1.0 <= min(draws) < 1.05 and 2.95 < max(draws) <= 3.0


def test_a_slow_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="rank 4 does not exist: with 4 ranks use -4 to 3"):
        ComputeTimes(SimulationConfig(ranks=4, slow_ranks=(4,)))


def test_a_slow_rank_that_does_not_exist_is_refused_beside_recorded_times_too() -> None:
    overrides = [
        "simulation.compute_time=recorded",
        "simulation.ranks=4",
        "simulation.slow_ranks=[4]",
    ]
    with pytest.raises(UserError, match="rank 4 does not exist"):
        Simulator(config.load(JOB, overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compute_time=normal", "did you mean 'lognormal'"),
        ("compute_mean=0.0", "greater than 0"),
        ("compute_mean=inf", "finite"),
        ("compute_sigma=-1.0", "greater than 0"),
        ("slow_factor=0.5", "greater than or equal to 1"),
        ("slow_factor=inf", "finite"),
    ],
)
def test_times_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"simulation.{override.partition('=')[0]}.*{message}"):
        config.load(None, [f"simulation.{override}"])
