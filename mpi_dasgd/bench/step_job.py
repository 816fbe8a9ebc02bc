"""One job of `bench step`: its arms, their settings, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpi_dasgd.bench.training_plan import TASKS, Scenario, cores
from mpi_dasgd.config import load
from mpi_dasgd.config.schema import Config

__all__ = [
    "ARMS",
    "DDP",
    "FUSED_REFERENCE",
    "IDLE",
    "LOCKSTEP",
    "MEETING_POINT",
    "OPTIMIZERS",
    "OUTPUT",
    "PACES",
    "PLAN",
    "REFERENCE",
    "SETTINGS",
    "Pace",
    "StepJob",
]

REFERENCE, FUSED_REFERENCE, DDP = "alone", "alone-fused", "ddp"
"""Arms that the others are compared with: plain loops of torch without any exchange, the second
with the optimizer's ``fused=True``; and the one over torch's DistributedDataParallel."""

PLAN, OUTPUT, MEETING_POINT = "plan.json", "samples.json", "meeting-point"
"""Files in the directory of a job: what to measure, what was measured, and the ranks' words."""

ARMS: Mapping[str, str] = {
    REFERENCE: "torch's optimizer, no exchange",
    FUSED_REFERENCE: "torch's optimizer with fused=True, no exchange",
    "adpsgd": "an exchange in every step, in one pass with the optimizer",
    "adpsgd-unfused": "the same behind torch's optimizer (optimizer.fused = off)",
    "swarm": "an exchange in every fourth step (H = 4)",
    "allreduce": "gradients averaged by one MPI_Allreduce, by hand",
    DDP: "torch's DistributedDataParallel over gloo",
}
"""What is measured, in words."""

LOCKSTEP = ("allreduce", DDP)
"""Arms whose ranks wait for each other in every step."""

IDLE = "idle"
"""Name of what is measured in slices in which nothing runs, in the place of an arm."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "adpsgd": {"algorithm.name": "adpsgd"},
    "adpsgd-unfused": {"algorithm.name": "adpsgd", "optimizer.fused": "off"},
    "swarm": {"algorithm.name": "swarm", "algorithm.local_steps": 4},
}
"""Keys of the configuration, of the arms that exchange models."""

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "AdamW": {"lr": 1e-4},
    "Adam": {"lr": 1e-4},
}
"""Optimizers of torch that can be measured, with their arguments."""

# Seconds outside of the rounds: of a job, of a rank on its core, and of a rank per parameter.
_START_SECONDS, _RANK_SECONDS, _PARAMETER_SECONDS = 2.0, 4.0, 2.5e-7
# A step of an arm in lockstep, as a multiple of a plain one. Measured.
_LOCKSTEP_FACTOR = 2.0


@dataclass(frozen=True)
class Pace:
    """How a task is measured, and how fast it is on one core.

    Attributes:
        parameters: elements of the model.
        steps: steps of each rank in a slice, the time for which an arm runs in a round.
        warm_up: further ones before them that do not count: the caches hold other arms' data.
        rounds: default number of rounds.
        gradient_s: seconds of a gradient.
        update_s: seconds of a step of SGD, and of Adam and AdamW: torch's default, and fused.
    """

    parameters: int
    steps: int
    warm_up: int
    rounds: int
    gradient_s: float
    update_s: Mapping[str, tuple[float, float]]


PACES = {
    "T1": Pace(9_930, 48, 8, 40, 0.002, {"SGD": (2e-4, 1e-4), "Adam": (4e-4, 2e-4)}),
    "T2": Pace(25_076_712, 3, 1, 12, 0.12, {"SGD": (0.06, 0.04), "Adam": (0.33, 0.06)}),
    "T3": Pace(1_199_882, 6, 1, 20, 0.045, {"SGD": (0.003, 0.002), "Adam": (0.012, 0.003)}),
}
"""The pace of each of `TASKS`."""


@dataclass(frozen=True)
class StepJob:
    """One job: all arms in the same processes.

    Attributes:
        task, ranks, straggler: as in `Scenario`; a straggler sleeps.
        optimizer: one of `OPTIMIZERS`.
        codec: as `codec.name`, of the arms that exchange models.
        groups: arms that are in memory together; each group has `REFERENCE`.
        rounds: rounds of each group. In a round every arm runs once, for some steps.
    """

    task: str
    ranks: int
    straggler: str
    optimizer: str
    codec: str
    groups: Sequence[Sequence[str]]
    rounds: int

    @property
    def scenario(self) -> Scenario:
        """What is trained, and on what."""
        return Scenario(self.task, self.ranks, self.straggler)

    def __str__(self) -> str:
        return f"{self.scenario} {self.optimizer}"

    @property
    def slow_rank(self) -> int | None:
        """The rank that is slowed, which is not compared; None: there is none."""
        return None if self.straggler == "none" else self.ranks - 1

    def slice_steps(self, arm: str) -> tuple[int, int]:
        """Return the steps that a rank makes in a slice: those that do not count, and the others.

        Of arms in lockstep they are as many times fewer as the straggler is slower.
        """
        pace = PACES[self.task]
        if arm in LOCKSTEP and self.scenario.slowdown > 1:
            return 1, max(2, pace.steps // self.scenario.slowdown)
        return pace.warm_up, pace.steps

    @property
    def expected_seconds(self) -> float:
        """Expected duration of the job."""
        slices = sum(self._slice_seconds(arm) for group in self.groups for arm in group)
        arms = sum(map(len, self.groups))
        building = arms * _PARAMETER_SECONDS * PACES[self.task].parameters
        per_rank = (_RANK_SECONDS + building) * max(1.0, self.ranks / cores())
        return _START_SECONDS + per_rank + (self.rounds + 1) * slices

    def _slice_seconds(self, arm: str) -> float:
        pace, slowdown = PACES[self.task], self.scenario.slowdown
        times = pace.update_s["SGD" if self.optimizer == "SGD" else "Adam"]
        default = arm in (REFERENCE, "adpsgd-unfused", *LOCKSTEP)
        step = pace.gradient_s + times[0 if default else 1]
        busy = self.ranks if slowdown == 1 else self.ranks - 1 + 1 / slowdown
        step *= max(1.0, busy / cores())
        if arm in LOCKSTEP:
            step = _LOCKSTEP_FACTOR * step + (slowdown - 1) * pace.gradient_s
        return sum(self.slice_steps(arm)) * step

    def config(self, arm: str) -> Config:
        """Return the configuration of an arm: its task, optimizer, straggler and algorithm."""
        task = TASKS[self.task]
        options = dict(OPTIMIZERS[self.optimizer])
        settings: dict[str, Any] = {
            "task.name": task.data,
            "task.model": task.model,
            "task.batch_size": task.batch,
            "optimizer.name": self.optimizer,
            "optimizer.lr": options.pop("lr"),
            "optimizer.options": {**options, **({"fused": True} if arm == FUSED_REFERENCE else {})},
            "algorithm.name": "alone",
            **SETTINGS.get(arm, {}),
        }
        if arm in SETTINGS:
            settings["codec.name"] = self.codec
        if self.slow_rank is not None:
            settings |= {
                "straggler.distribution": "constant",
                "straggler.factor": self.scenario.slowdown,
                "straggler.mode": "sleep",
            }
        return load(settings)
