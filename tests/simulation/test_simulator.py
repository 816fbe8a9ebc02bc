"""The simulator: effective step, stability, conservation, no waiting, repeatability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator, simulate
from mpi_dasgd.tasks.convex import BreastCancer
from mpi_dasgd.transport.control_words import HEAD
from mpi_dasgd.transport.publication import Claim, Publication
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"
SLOW = "simulation.slow_ranks=[0]"


def _run(*overrides: str) -> dict[str, Any]:
    return simulate(config.load(JOB, overrides))


def _seeds(*overrides: str, count: int = 3) -> list[dict[str, Any]]:
    return [_run(f"run.seed={seed}", *overrides) for seed in range(1, count + 1)]


def _effective_step(*overrides: str) -> float:
    return float(np.mean([metrics["effective_step"] for metrics in _seeds(*overrides)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "latency"),
    [(2, 0.02), (3, 0.02), (8, 0.02), (16, 0.02), (2, 0), (16, 0), (3, 0.7), (16, 0.7)],
)
def test_effective_step_of_adpsgd(ranks: int, latency: float) -> None:
    setting = f"simulation.ranks={ranks}", f"simulation.latency={latency}"
    assert _effective_step(*setting) == pytest.approx(1, abs=0.03)
    assert _effective_step(*setting, SLOW) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["ring", "exponential", "torus", "hypercube"])
def test_effective_step_on_sparse_graphs(graph: str) -> None:
    assert _effective_step(f"topology.graph={graph}") == pytest.approx(1, abs=0.03)


def test_effective_step_of_references() -> None:
    assert _effective_step("algorithm.name=allreduce") == pytest.approx(1, abs=1e-9)
    assert _effective_step("algorithm.name=alone") == pytest.approx(1, abs=0.03)


class _Unclaimed(Publication):
    """Broken on purpose: a version serves any number of exchanges."""

    def claim(self, rank: int) -> Claim | None:
        head = self._words.read(rank, HEAD)
        return Claim(rank, head & 0xFF, head >> 8)

    def release(self, claim: Claim) -> None:
        pass


class _WithoutClaims(VirtualEndpoint):
    def __init__(self, network: Any, rank: int) -> None:
        super().__init__(network, rank)
        memory = network.memory
        self.publication = _Unclaimed(memory, memory, memory.word_map, rank, self.counters)


@pytest.mark.slow
def test_without_claims_the_same_run_diverges_with_a_straggler() -> None:
    # A small inbox alone bounds how many deltas add up; with a large one only the claim does.
    settings = [
        "simulation.latency=0", SLOW, "simulation.slow_factor=100", "transport.inbox_slots=64",
        "budget.samples=16000",
    ]  # fmt: skip
    assert max(metrics["max_disagreement"] for metrics in _seeds(*settings)) < 100
    broken = [
        Simulator(config.load(JOB, [*settings, f"run.seed={seed}"]), _WithoutClaims).run()
        for seed in range(1, 4)
    ]
    assert all(metrics["diverged"] for metrics in broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "latency", "gradients", "exchanges"),
    [
        (2, 0, 8000, 1000),
        (2, 0.3, 8000, 1000),
        (5, 0, 8000, 4000),
        (5, 0.3, 8000, 2000),
        (16, 0, 16_000, 10_000),
        (16, 0.3, 30_000, 10_000),
    ],
)
def test_sum_is_conserved_over_thousands_of_exchanges_without_gradients(
    ranks: int, latency: float, gradients: int, exchanges: int
) -> None:
    metrics = _run(
        "simulation.gradients=false", f"simulation.latency={latency}", f"simulation.ranks={ranks}",
        "simulation.compute_time=exponential", SLOW, f"budget.samples={gradients}",
    )  # fmt: skip
    assert metrics["exchanges"] >= exchanges
    assert metrics["conservation_error"] < 1e-12
    assert metrics["final_disagreement"] < 1e-6 * metrics["max_disagreement"]


def test_sum_and_gradients_add_up_with_gradients_on() -> None:
    assert _run("simulation.noise=1", SLOW)["conservation_error"] < 1e-12
    assert _run("simulation.dtype=float32")["conservation_error"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["constant", "uniform", "lognormal", "exponential"])
@pytest.mark.parametrize("network", ["latency=0", "latency=0.5", "bandwidth=400"])
def test_adpsgd_never_yields(compute: str, network: str) -> None:
    metrics = _run(f"simulation.compute_time={compute}", f"simulation.{network}", SLOW)
    assert metrics["waits"] == 0
    assert metrics["exchanges"] > 100


def test_allreduce_yields() -> None:
    assert _run("algorithm.name=allreduce")["waits"] > 0


def test_a_straggler_holds_up_allreduce_and_not_adpsgd() -> None:
    times = {
        name: _run(f"algorithm.name={name}", SLOW)["virtual_time"]
        for name in ("adpsgd", "allreduce")
    }
    # 16 ranks, one 10 times slower: 15.1 against 1.6 steps per unit of time
    assert times["allreduce"] / times["adpsgd"] == pytest.approx(15.1 / 1.6, rel=0.15)


def test_a_run_repeats_bit_for_bit() -> None:
    settings = ["simulation.noise=1", "simulation.compute_time=exponential"]
    first, second, other = (
        {
            k: v
            for k, v in _run(*settings, seed).items()
            if not k.startswith(("seconds", "events_per"))
        }
        for seed in ("run.seed=5", "run.seed=5", "run.seed=6")
    )
    assert first == second
    assert first["final_distance"] != other["final_distance"]


@pytest.mark.slow
def test_consensus_distance_under_noise_matches_the_prototype() -> None:
    # design, section 4: 0.30 for claims with four attempts; rate 0.05, noise 5, dimension 8
    metrics = _seeds(
        "simulation.noise=5", "optimizer.lr=0.05", "budget.samples=12000", "simulation.latency=0"
    )
    assert np.mean([f["final_disagreement"] for f in metrics]) == pytest.approx(0.3, rel=0.5)


def test_logistic_regression_comes_near_its_known_optimum() -> None:
    problem = BreastCancer(4)
    # the optimum without intercept is 0.100446; an intercept can only lower it
    assert problem.value(problem.optimum) < 0.100447
    gradient = problem._mean_gradient(problem._all, problem.optimum)
    assert np.linalg.norm(gradient) < 1e-12
    metrics = _run(
        "task.name=breast_cancer", "task.batch_size=16", "optimizer.lr=0.1",
        "schedule.name=cosine", "budget.samples=320000", "simulation.ranks=8",
    )  # fmt: skip
    assert 0 <= metrics["excess_loss"] < 2e-3


@pytest.mark.slow
def test_heterogeneous_functions_have_the_mean_as_their_optimum() -> None:
    metrics = _run("simulation.heterogeneity=1", "budget.samples=40000")
    assert metrics["final_distance"] < 0.1


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.name.*digits"):
        _run("task.name=digits")
    with pytest.raises(UserError, match=r"budget\.samples"):
        simulate(config.load(None, ["task.name=quadratic"]))
    with pytest.raises(UserError, match="SGD"):
        _run("optimizer.name=Adam")
    with pytest.raises(UserError, match="at least 2 ranks"):
        _run("simulation.ranks=1")
