"""Budgets: where ranks in lockstep stop by the clock, learning rates, and resumed runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import config, topology
from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.training.budget import Budget
from mpi_dasgd.training.learning_rate import LearningRate
from mpi_dasgd.transport.membership import FINISHED, RUNNING
from tests.support.training import train
from tests.support.virtual_ranks import JOB

SETTINGS = [
    ("allreduce", "complete", []),
    ("local_sgd", "complete", ["algorithm.local_steps=4"]),
    ("dpsgd", "ring", []),
    ("dpsgd", "torus", ["algorithm.local_steps=3"]),
    ("sgp", "ring", []),
    ("sgp", "exponential", ["algorithm.local_steps=2"]),
    ("sgp", "complete", []),
    ("osgp", "exponential", ["algorithm.overlap_tau=2"]),
    ("osgp", "ring", ["algorithm.overlap_tau=3", "algorithm.local_steps=2"]),
]


class _Watched(Simulator):
    """Measures how far the others are beyond rank 0's next exchange when rank 0 begins a step."""

    ahead = -1

    def _on_gradient_ready(self, rank: int) -> None:
        super()._on_gradient_ready(rank)
        if rank == 0:
            steps, local_steps = self.locals[0].local_step, self.config.algorithm.local_steps
            exchange = -(-steps // local_steps) * local_steps
            self.ahead = max(self.ahead, *(local.local_step - exchange for local in self.locals))


@pytest.mark.parametrize(("algorithm", "graph", "extra"), SETTINGS)
@pytest.mark.parametrize("ranks", [6, 9])
def test_no_rank_is_farther_ahead_than_the_last_step_is_declared(
    algorithm: str, graph: str, extra: list[str], ranks: int
) -> None:
    """Rank 0 is slow: the others are as far ahead of it as they can be."""
    settings = config.load(
        JOB,
        [
            f"algorithm.name={algorithm}", f"topology.graph={graph}", f"simulation.ranks={ranks}",
            "simulation.slow_ranks=[0]", "simulation.slow_factor=50", "simulation.latency=0",
            "simulation.compute_time=exponential", f"budget.samples={40 * ranks}", *extra,
        ],
    )  # fmt: skip
    simulation = _Watched(settings)
    simulation.run()
    lead = type(simulation.algorithms[0]).max_steps_ahead(
        settings.algorithm, topology.build(graph, ranks)
    )
    assert simulation.ahead <= lead
    assert lead == 0 or simulation.ahead > 0, "no rank was ahead"


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ("dpsgd", ["topology.graph=ring", "algorithm.local_steps=4"]),
        ("sgp", ["topology.graph=exponential"]),
    ],
)
def test_all_stop_at_the_same_step_by_the_clock(
    algorithm: str, extra: list[str], tmp_path: Path
) -> None:
    for seconds in (1, 8, 40):  # as many as a busy machine needs for some steps
        train(
            4, tmp_path, f"algorithm.name={algorithm}", f"budget.seconds={seconds}",
            "schedule.name=constant", "schedule.warmup=0", "straggler.distribution=constant",
            "straggler.ranks=[0]", "straggler.factor=5", "evaluation.count=1",
            "evaluation.live=false", "run.overwrite=true", *extra,
        )  # fmt: skip
        results = load_run(tmp_path / "run").results
        assert results.attributes["status"] == "finished"
        steps = results.n_records["train"]
        assert steps.min() == steps.max()
        if steps.max() > 10:
            break
    assert steps.max() > 10


@pytest.mark.mpi
def test_a_resumed_run_does_not_take_its_past_for_delays(tmp_path: Path) -> None:
    settings = ["checkpoint.count=2", "evaluation.count=1", "evaluation.live=false"]
    train(3, tmp_path, *settings, "budget.epochs=4", together=True)
    train(3, tmp_path, *settings, "budget.epochs=6", "run.resume=true", together=True)
    resumed = load_run(tmp_path / "run")
    assert resumed.results.attributes["status"] == "finished"
    assert resumed.column("train", "step").min() > 20  # else this is not the resumed part
    first = [row[0] for row in resumed.results.tables["train"]["delay"]]
    assert max(first) < 20


@pytest.mark.parametrize("algorithm", ["allreduce", "local_sgd"])
def test_ranks_in_lockstep_have_one_learning_rate(algorithm: str) -> None:
    simulation = Simulator(
        config.load(
            JOB,
            [
                f"algorithm.name={algorithm}", "schedule.name=cosine", "schedule.warmup=0.1",
                "simulation.ranks=8", "budget.samples=800", "simulation.compute_time=exponential",
            ],
        )
    )  # fmt: skip
    assert simulation.run()["drained_disagreement"] < 1e-15
    assert np.ptp([local.lr for local in simulation.locals]) == 0


class _Membership:
    """What other ranks have said: 10 samples; rank 0's last step."""

    def __init__(self) -> None:
        self.last_step = 0
        self.samples = [10, 0, 0, 0]
        self.status = [RUNNING] * 4

    @property
    def total_samples(self) -> int:
        return sum(self.samples)

    def read_last_step(self, rank: int) -> int:
        assert rank == 0
        return self.last_step

    def publish_last_step(self, step: int) -> None:
        self.last_step = step


def _budget(*overrides: str, lockstep: bool = False, rank: int = 0) -> tuple[Budget, _Membership]:
    parts: Any = SimpleNamespace(
        config=config.load(None, overrides),
        lockstep=lockstep,
        max_steps_ahead=2,
        topology=topology.build("complete", 4),
    )
    membership: Any = _Membership()
    return Budget(parts, membership, rank), membership


def _set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("mpi_dasgd.training.budget.time.monotonic", lambda: seconds)


def test_progress_is_a_fraction_of_the_samples_of_all_ranks() -> None:
    budget, membership = _budget("budget.samples=40")
    assert (budget.total_samples, budget.progress) == (10, 0.25)
    assert not budget.is_spent(1)
    membership.samples[1] = 31
    assert budget.progress == 1.0
    assert budget.is_spent(1)


def test_a_schedule_follows_what_is_known_at_the_end_of_the_last_step() -> None:
    budget, membership = _budget("budget.samples=40")
    assert budget.progress_of_step() == 0.25  # the first step
    assert not budget.was_spent(1)
    membership.samples[1] = 10
    assert budget.progress_of_step() == 0.25 and budget.progress == 0.5
    assert not budget.was_spent(2)
    assert budget.progress_of_step() == 0.5
    membership.samples[2] = 10
    budget.resume(7, 0.0)
    assert budget.progress_of_step() == 0.75
    lockstep, _ = _budget("budget.samples=40", lockstep=True)
    assert not lockstep.was_spent(0)
    lockstep.samples = 5  # in lockstep the step that begins counts: all ranks make it
    assert lockstep.progress_of_step() == 0.5


def test_ranks_in_lockstep_know_the_samples_of_all_without_reading() -> None:
    budget, membership = _budget("budget.samples=40", lockstep=True)
    budget.samples = 9
    assert (budget.total_samples, budget.progress) == (36, 0.9)
    budget.samples = 10
    assert budget.is_spent(1)
    membership.status[0], membership.samples[3] = FINISHED, 29
    assert budget.total_samples == 39  # what it was indeed


def test_a_budget_in_seconds_goes_on_where_an_earlier_part_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set_clock(monkeypatch, 100.0)
    budget, _ = _budget("budget.seconds=8")
    _set_clock(monkeypatch, 101.0)
    assert (budget.elapsed, budget.progress) == (1.0, 0.125)
    budget.resume(5, 3.0)
    assert budget.samples == 5
    budget.restart_clock()
    assert budget.elapsed == 3.0
    _set_clock(monkeypatch, 107.0)
    assert budget.is_spent(1)


def test_without_a_budget_training_never_ends() -> None:
    budget, _ = _budget()
    assert budget.progress == 0.0
    assert not budget.is_spent(10**9)


def test_rank_0_declares_the_last_step_once_and_all_obey_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _set_clock(monkeypatch, 0.0)
    settings = ("budget.seconds=8", "algorithm.name=local_sgd", "algorithm.local_steps=4")
    budget, membership = _budget(*settings, lockstep=True)
    other, others_view = _budget(*settings, lockstep=True, rank=1)
    budget.declare_last_step(5)
    assert membership.last_step == 0  # there is time left
    _set_clock(monkeypatch, 9.0)
    other.declare_last_step(5)
    assert others_view.last_step == 0  # it is for rank 0 to say
    assert not budget.is_spent(5)
    budget.declare_last_step(5)
    assert membership.last_step == 8 + 2  # the next exchange, and what another may be ahead
    budget.declare_last_step(9)
    assert membership.last_step == 10
    assert not budget.was_spent(10)  # it has not looked
    assert not budget.is_spent(9)
    assert budget.is_spent(10)
    assert budget.was_spent(10) and not budget.was_spent(9)


@pytest.mark.parametrize("applies_itself", [False, True])
def test_the_learning_rate_follows_progress_and_delay(applies_itself: bool) -> None:
    gradients = [0]
    endpoint: Any = SimpleNamespace(gradients=lambda: gradients[0])
    parts: Any = SimpleNamespace(
        algorithm_cls=SimpleNamespace(
            capabilities=SimpleNamespace(applies_step_rule=applies_itself)
        ),
        schedule=SimpleNamespace(is_constant=False, factor=lambda progress: 1 - progress),
        step_rule=lambda delay: 1 / (1 + delay),
    )
    rate = LearningRate(parts, endpoint)
    half: Any = SimpleNamespace(progress_of_step=lambda: 0.5)
    gradients[0] = 1  # its own
    assert rate.of_gradient(gradients[0], half) == 0.5
    assert rate.delay == 0
    rate.begin_gradient()
    gradients[0] += 4  # its own, and three of others
    assert rate.of_gradient(gradients[0], half) == (0.5 if applies_itself else 0.125)
    assert rate.delay == 3
    assert rate.delay_factor == (1.0 if applies_itself else 0.25)
    assert rate.scheduled(0.25) == 0.75
