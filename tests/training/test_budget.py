"""Budgets: where ranks that go in step stop by the clock, one learning rate, and resumed runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd import config, topology
from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.config import consistency
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
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
    ("osgp", "exponential", ["algorithm.overlap=2"]),
    ("osgp", "ring", ["algorithm.overlap=3", "algorithm.local_steps=2"]),
]


class _Watched(Simulator):
    """Notes, whenever rank 0 begins a step, how far beyond its next exchange the others are."""

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
            "simulation.compute=exponential", f"budget.samples={40 * ranks}", *extra,
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
    train(
        4, tmp_path, f"algorithm.name={algorithm}", "budget.seconds=1", "schedule.name=constant",
        "schedule.warmup=0", "straggler.kind=constant", "straggler.ranks=[0]", "straggler.factor=5",
        "evaluation.points=1", "evaluation.live=false", *extra,
    )  # fmt: skip
    results = load_run(tmp_path / "run").results
    assert results.attributes["status"] == "finished"
    steps = results.n_records["train"]
    assert steps.min() == steps.max() > 10


@pytest.mark.mpi
def test_a_resumed_run_does_not_take_its_past_for_delays(tmp_path: Path) -> None:
    settings = ["checkpoint.points=2", "evaluation.points=1", "evaluation.live=false"]
    train(3, tmp_path, *settings, "budget.epochs=4")
    train(3, tmp_path, *settings, "budget.epochs=6", "run.resume=true")
    resumed = load_run(tmp_path / "run")
    assert resumed.results.attributes["status"] == "finished"
    assert resumed.column("train", "step").min() > 20  # else this is not the resumed part
    first = [row[0] for row in resumed.results.tables["train"]["delay"]]
    assert max(first) < 20


@pytest.mark.parametrize("algorithm", ["allreduce", "local_sgd"])
def test_ranks_in_step_have_one_learning_rate(algorithm: str) -> None:
    simulation = Simulator(
        config.load(
            JOB,
            [
                f"algorithm.name={algorithm}", "schedule.name=cosine", "schedule.warmup=0.1",
                "simulation.ranks=8", "budget.samples=800", "simulation.compute=exponential",
            ],
        )
    )  # fmt: skip
    assert simulation.run()["drained_disagreement"] < 1e-15
    assert np.ptp([local.lr for local in simulation.locals]) == 0


@pytest.mark.parametrize(
    ("overrides", "in_step", "words"),
    [
        (["budget.epochs=3"], False, r"budget\.epochs: .* does not know the data set"),
        (["schedule.name=cosine"], False, "there is no budget"),
        (["schedule.warmup=0.1"], False, "there is no budget"),
        (["schedule.name=cosine", "budget.seconds=1"], True, "learning rates would differ"),
        (["schedule.warmup=0.1", "budget.seconds=1"], True, "learning rates would differ"),
        (["checkpoint.points=2", "budget.seconds=1"], True, "at different steps"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    overrides: list[str], in_step: bool, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        consistency.check(config.load(None, overrides), "some", in_step)


@pytest.mark.parametrize(
    ("overrides", "in_step"),
    [
        ([], False),
        (["schedule.name=cosine", "budget.samples=9", "checkpoint.points=2"], True),
        (["schedule.name=cosine", "budget.seconds=1", "checkpoint.points=2"], False),
        (["budget.seconds=1"], True),
    ],
)
def test_other_budgets_are_not(overrides: list[str], in_step: bool) -> None:
    consistency.check(config.load(None, overrides), "some", in_step)


def test_eccentricity() -> None:
    assert topology.build("complete", 7).eccentricity(0) == 1
    assert topology.build("ring", 7).eccentricity(3) == 3
    assert topology.build("hypercube", 16).eccentricity(5) == 4
