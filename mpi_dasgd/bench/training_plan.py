"""Plan of `bench training`: its tasks and scenarios, and the jobs to measure in their order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mpi_dasgd.bench.options import validate_names
from mpi_dasgd.config import load
from mpi_dasgd.config.schema import CodecConfig, Config
from mpi_dasgd.errors import UserError

__all__ = [
    "ALGORITHMS",
    "FULL_PLAN",
    "QUICK_PLAN",
    "REFERENCE",
    "TASKS",
    "Measurement",
    "Plan",
    "Scenario",
    "cores",
]

REFERENCE = "alone"
"""Algorithm without any exchange, to whose throughput the others are compared."""
ALGORITHMS = (REFERENCE, "adpsgd", "allreduce", "ddp")

# Seconds between two snapshots where the time to a target accuracy is measured.
_MILESTONE_SECONDS = 0.02
# Seconds that a job takes outside of the training: in all, and of one core per rank. Measured.
_START_SECONDS, _RANK_SECONDS = 1.0, 3.5
_CODECS = tuple(f"adpsgd:{name}" for name in get_args(CodecConfig.model_fields["name"].annotation))


@dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        data, model, batch: as in section ``task`` of the configuration.
        seconds: default length of a measurement: at least some 10 steps of a rank that is 10
            times slower.
        target: test accuracy to reach; None for data that cannot be learnt.
        extra_seconds: core seconds per rank, beyond those of every job, for start and end.
    """

    data: str
    model: str
    batch: int
    seconds: float
    target: float | None = None
    extra_seconds: float = 0.0


TASKS = {
    "T1": Task("digits", "cnn", 32, 6.0, target=0.95, extra_seconds=2.0),
    "T2": Task("random", "mlp_25m", 16, 20.0, extra_seconds=4.0),
    "T3": Task("random", "cnn_1m", 32, 10.0, extra_seconds=0.5),
}

FULL_PLAN: dict[str, Any] = {
    "tasks": tuple(TASKS),
    "ranks": (2, 4),
    "stragglers": ("none", "s4", "s10", "c4", "c10"),
    "algorithms": ALGORITHMS,
    "repeats": 3,
    "seconds": None,
    "device": "cpu",
}
"""Arguments of `Plan` by default."""
QUICK_PLAN: dict[str, Any] = {
    **FULL_PLAN,
    "tasks": ("T1",),
    "ranks": (2,),
    "stragglers": ("none", "s10"),
    "repeats": 1,
    "seconds": 3.0,
}
"""Arguments of `Plan` with ``--quick``."""


@dataclass(frozen=True)
class Scenario:
    """A task on a number of ranks, with or without a straggler.

    Attributes:
        task: key of `TASKS`.
        ranks: number of ranks.
        straggler: ``none``, ``sK`` (the last rank sleeps to be K times slower) or ``cK`` (it
            computes K times as much).
    """

    task: str
    ranks: int
    straggler: str

    @property
    def slowdown(self) -> int:
        """How many times slower the last rank is."""
        return 1 if self.straggler == "none" else int(self.straggler[1:])

    def __str__(self) -> str:
        return f"{self.task} n={self.ranks} {self.straggler}"


@dataclass(frozen=True)
class Measurement:
    """One job to measure.

    Attributes:
        scenario: what is trained, and on what.
        algorithm: name of the algorithm, or ``algorithm:codec``.
        repeat: number of the repeat, from 0; repeats differ in their seed only.
        seconds: budget of the training.
        device: ``cpu``, or ``cuda`` for the GPUs, which ranks may have to share.
    """

    scenario: Scenario
    algorithm: str
    repeat: int
    seconds: float
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.scenario} {self.algorithm}, repeat {self.repeat + 1}"

    @property
    def expected_seconds(self) -> float:
        """Expected duration of the job, with start, evaluation and end."""
        per_rank = _RANK_SECONDS + TASKS[self.scenario.task].extra_seconds
        return self.seconds + _START_SECONDS + per_rank * max(1.0, self.scenario.ranks / cores())

    def config(self, directory: Path) -> Config:
        """Return the configuration of the job, which puts its results into `directory`/run.

        The one for DDP differs from the others only in its algorithm, which DDP ignores.
        """
        scenario, task = self.scenario, TASKS[self.scenario.task]
        algorithm, _, codec = self.algorithm.partition(":")
        if algorithm == "ddp":
            algorithm = "allreduce"
        milestones = 1 if task.target is None else max(1, round(self.seconds / _MILESTONE_SECONDS))
        settings = {
            "run.name": "run",
            "run.directory": str(directory),
            "run.seed": 1 + self.repeat,
            "task.name": task.data,
            "task.model": task.model,
            "task.batch_size": task.batch,
            "optimizer.name": "SGD",
            "optimizer.lr": 0.01,
            "optimizer.options": "{momentum = 0.9}",
            "budget.seconds": self.seconds,
            "algorithm.name": algorithm,
            **({"codec.name": codec} if codec else {}),
            **({"optimizer.fused": "off"} if algorithm == "alone" else {}),  # torch's own loop
            "evaluation.live": "false",
            "evaluation.count": milestones,
        }
        if self.device == "cuda":
            settings["device.share"] = "true"
        if scenario.straggler != "none":
            settings |= {
                "straggler.distribution": "constant",
                "straggler.factor": scenario.slowdown,
                "straggler.mode": "sleep" if scenario.straggler[0] == "s" else "busy",
            }
        return load(None, (f"{key}={value}" for key, value in settings.items()))


@dataclass(frozen=True)
class Plan:
    """All measurements of one run of the benchmark.

    Args:
        tasks, ranks, stragglers, algorithms: all combinations are measured, `REFERENCE` always.
        repeats: measurements of each combination.
        seconds: budget of each measurement; None for the task's own.
        device: ``cpu``, or ``cuda`` for the GPUs, which ranks may have to share.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    tasks: Sequence[str]
    ranks: Sequence[int]
    stragglers: Sequence[str]
    algorithms: Sequence[str]
    repeats: int
    seconds: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        validate_names("bench training: --tasks", self.tasks, TASKS)
        validate_names("bench training: --algorithms", self.algorithms, (*ALGORITHMS, *_CODECS))
        for name in self.stragglers:
            if name != "none" and not re.fullmatch(r"[sc][1-9]\d*", name):
                raise UserError(
                    f"bench training: --stragglers: {name!r} is not known; expected none, s10 (the "
                    "last rank sleeps to be 10 times slower) or c10 (it computes 10 times as much)"
                )
        if min(self.ranks) < 2:
            raise UserError(f"bench training: --ranks: needs 2 or more, got {min(self.ranks)}")
        if self.repeats < 1:
            raise UserError(f"bench training: --repeats must be 1 or more, got {self.repeats}")
        if self.seconds is not None and self.seconds <= 0:
            raise UserError(f"bench training: --seconds must be above 0, got {self.seconds:g}")

    @property
    def scenarios(self) -> list[Scenario]:
        """Every combination of task, ranks and straggler, once."""
        combinations = (
            Scenario(task, ranks, straggler)
            for task in self.tasks
            for ranks in self.ranks
            for straggler in self.stragglers
        )
        return list(dict.fromkeys(combinations))

    def measurements(self) -> Iterator[Measurement]:
        """Yield the measurements: each repeat passes through all scenarios.

        The algorithms of a scenario follow each other, so that what is compared is close in time,
        and their order rotates from repeat to repeat, so that none is always the first.
        """
        algorithms = list(dict.fromkeys([REFERENCE, *self.algorithms]))
        for repeat in range(self.repeats):
            first = repeat % len(algorithms)
            for scenario in self.scenarios:
                seconds = TASKS[scenario.task].seconds if self.seconds is None else self.seconds
                for algorithm in algorithms[first:] + algorithms[:first]:
                    yield Measurement(scenario, algorithm, repeat, seconds, self.device)


def cores() -> int:
    """Return the number of cores that this process, and so the job, may use."""
    return len(os.sched_getaffinity(0))
