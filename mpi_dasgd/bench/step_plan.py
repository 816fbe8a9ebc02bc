"""Plan of `bench step`: the jobs to run, and which arms are in memory together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mpi_dasgd.bench.options import validate_names
from mpi_dasgd.bench.step_job import (
    ARMS,
    FUSED_REFERENCE,
    LOCKSTEP,
    OPTIMIZERS,
    PACES,
    REFERENCE,
    SETTINGS,
    StepJob,
)
from mpi_dasgd.bench.training_plan import TASKS
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.errors import UserError

__all__ = ["FULL_PLAN", "QUICK_PLAN", "StepPlan", "group_arms"]

FULL_PLAN: dict[str, Any] = {
    "tasks": tuple(TASKS),
    "ranks": (2, 4),
    "stragglers": ("none", "s10"),
    "optimizers": ("SGD", "AdamW"),
    "arms": tuple(ARMS),
    "codec": "auto",
    "rounds": None,
}
"""Arguments of `StepPlan` by default."""
QUICK_PLAN: dict[str, Any] = {
    **FULL_PLAN,
    "tasks": ("T1",),
    "ranks": (2,),
    "stragglers": ("none",),
    "optimizers": ("SGD",),
    "rounds": 10,
}
"""Arguments of `StepPlan` with ``--quick``."""

_CODECS = get_args(CodecConfig.model_fields["name"].annotation)
# Tensors as large as the model that an optimizer keeps.
_STATES = {"SGD": 1, "AdamW": 2, "Adam": 2}
# What else a rank holds: torch, data, the gradient of the arm that runs is counted beside it.
_RANK_BYTES = 350e6


@dataclass(frozen=True)
class StepPlan:
    """All jobs of one run of the benchmark.

    Args:
        tasks, ranks, stragglers, optimizers: each combination is a job.
        arms: arms of each job, of `ARMS`; `REFERENCE` always.
        codec: as `codec.name`, of the arms that exchange models.
        rounds: rounds of each job; None for the task's own.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    tasks: Sequence[str]
    ranks: Sequence[int]
    stragglers: Sequence[str]
    optimizers: Sequence[str]
    arms: Sequence[str]
    codec: str
    rounds: int | None = None

    def __post_init__(self) -> None:
        validate_names("bench step: --tasks", self.tasks, TASKS)
        validate_names("bench step: --optimizers", self.optimizers, OPTIMIZERS)
        validate_names("bench step: --arms", self.arms, ARMS)
        validate_names("bench step: --codec", [self.codec], _CODECS)
        for name in self.stragglers:
            if name != "none" and not re.fullmatch(r"s([2-9]|[1-9]\d+)", name):
                raise UserError(
                    f"bench step: --stragglers: {name!r} is not known; expected none, or s10 (the "
                    "last rank sleeps to be 10 times slower)"
                )
        if min(self.ranks) < 2:
            raise UserError(f"bench step: --ranks: needs 2 or more, got {min(self.ranks)}")
        if self.rounds is not None and self.rounds < 1:
            raise UserError(f"bench step: --rounds must be 1 or more, got {self.rounds}")

    def jobs(self, memory: float | None) -> Iterator[StepJob]:
        """Yield the jobs, each combination once.

        Args:
            memory: bytes that the ranks of a job may hold; None: as many as they like.

        Raises:
            UserError: the memory is too small for arms that are compared.
        """
        arms = [arm for arm in ARMS if arm in self.arms or arm == REFERENCE]
        combinations = (
            (task, ranks, straggler, optimizer)
            for task in self.tasks
            for optimizer in self.optimizers
            for ranks in self.ranks
            for straggler in self.stragglers
        )
        for task, ranks, straggler, optimizer in dict.fromkeys(combinations):
            sizes = {
                arm: ranks * _arm_bytes(arm, task, ranks, optimizer, self.codec) for arm in arms
            }
            base = ranks * (_RANK_BYTES + 4 * PACES[task].parameters)  # one gradient at a time
            try:
                groups = group_arms(sizes, None if memory is None else memory - base)
            except MemoryError as error:
                raise UserError(
                    f"bench step: {task} with {ranks} ranks: {error.args[0] / 1e9:.1f} GB are not "
                    "free for arms that are compared; give fewer --ranks, or another of --tasks"
                ) from error
            rounds = self.rounds or PACES[task].rounds
            yield StepJob(task, ranks, straggler, optimizer, self.codec, groups, rounds)


def group_arms(sizes: Mapping[str, float], memory: float | None) -> list[list[str]]:
    """Divide arms into as few groups as fit into memory, one group after the other.

    Every group has the references, with which the others are compared in the same rounds.

    Args:
        sizes: bytes of each arm, in the order of the groups.
        memory: bytes that a group may have; None: no limit.

    Raises:
        MemoryError: the references and one arm take more; the argument is how much.
    """
    references = [arm for arm in sizes if arm in (REFERENCE, FUSED_REFERENCE)]
    others = [arm for arm in sizes if arm not in references]
    limit = float("inf") if memory is None else memory
    base = sum(sizes[arm] for arm in references)
    largest = base + max((sizes[arm] for arm in others), default=0.0)
    if largest > limit:
        raise MemoryError(largest)
    groups = [list(references)]
    for arm in others:
        if sum(sizes[member] for member in groups[-1]) + sizes[arm] > limit:
            groups.append(list(references))
        groups[-1].append(arm)
    return groups


def _arm_bytes(arm: str, task: str, ranks: int, optimizer: str, codec: str) -> float:
    """Return the bytes that a rank holds for an arm while it rests: without a gradient."""
    from mpi_dasgd.algorithms import catalogue

    parameters = PACES[task].parameters
    model = 4.0 * parameters
    held = model * (1 + _STATES[optimizer])
    if arm in LOCKSTEP:
        return held + model  # gradients in a buffer of its own
    if arm not in SETTINGS:
        return held
    name = SETTINGS[arm]["algorithm.name"]
    rows = catalogue.rows(catalogue.Sizes(parameters, ranks, codec))
    return held + next(row["memory_bytes"][""] for row in rows if row["algorithm"] == name)
