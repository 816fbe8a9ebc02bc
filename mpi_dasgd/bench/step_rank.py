"""One rank of a job of `bench step`: ``python -m mpi_dasgd.bench.step_rank DIRECTORY``.

All arms live in the same processes and run in turn, for slices of some steps, so that what a
machine does to one it does to all: only ratios within a round compare. In a slice of an
asynchronous arm every rank goes on until all that are compared have made their steps, so that they
disturb each other all the time as in a long run. A straggler that is asleep when a slice ends
sleeps the rest in the next one of that arm.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from mpi_dasgd import launch, world
from mpi_dasgd.bench.measured_rank import busy_seconds
from mpi_dasgd.bench.meeting_point import MeetingPoint
from mpi_dasgd.bench.step_arms import Arm, build_arm
from mpi_dasgd.bench.step_job import IDLE, MEETING_POINT, OUTPUT, PLAN, StepJob
from mpi_dasgd.bench.training_plan import cores

__all__ = ["StepRank", "main"]

_IDLE_SECONDS = 0.05  # of a slice in which nothing runs
_NAP_SECONDS = 0.005  # of a sleeper, between two looks whether the slice has ended
_CALIBRATION_STEPS = 6


class StepRank:
    """Measures the arms on one rank.

    Args:
        job: what is measured.
        environment: the ranks of the job.
        directory: directory of the job.

    Attributes:
        rows: one dict for each slice: `round`, `arm`, `rank`, whether it is `slow`; `steps` that
            count; `seconds` of them, of which `update_seconds` behind the gradient; `cpu_seconds`
            of all threads of the process meanwhile; `messages` sent.
    """

    def __init__(self, job: StepJob, environment: world.World, directory: Path) -> None:
        self.job, self.rows = job, list[dict[str, Any]]()
        self._environment, self._directory = environment, directory
        self._slow = environment.rank == job.slow_rank
        self._compared = job.ranks if job.slow_rank is None else job.slow_rank
        self._meeting = MeetingPoint(directory / MEETING_POINT, environment.rank)
        self._gradient_seconds: deque[float] = deque(maxlen=15)
        self._sleep_left: dict[str, float] = {}

    def run(self) -> None:
        """Measure all groups of arms. Collective.

        Raises:
            ValueError: the arms did not train on the same problem.
        """
        for number, names in enumerate(self.job.groups):
            self._run_group(names, number * self.job.rounds)
            gc.collect()  # the arms of a group make room for the next
        if dist.is_initialized():
            dist.destroy_process_group()

    def _run_group(self, names: Sequence[str], first: int) -> None:
        arms = [build_arm(name, self.job, self._environment, self._directory) for name in names]
        self._calibrate(arms[0])
        for index in range(-1, self.job.rounds):
            self._run_round(arms, first + index, counts=index >= 0)
        _require_same_start(arms)
        self._meeting.meet()
        for arm in arms:
            arm.close()

    def _calibrate(self, arm: Arm) -> None:
        """Let all ranks make some steps at once, to know how long a gradient takes."""
        self._meeting.meet()
        for _ in range(_CALIBRATION_STEPS):
            self._make_step(arm)
        self._gradient_seconds.popleft()  # it made the caches warm

    def _run_round(self, arms: list[Arm], number: int, *, counts: bool) -> None:
        """Run every arm once; from round to round another one begins, in alternating directions."""
        begin = number % len(arms)
        order = arms[begin:] + arms[:begin]
        for arm in order if number % 2 else reversed(order):
            row = self._run_slice(arm)
            arm.clear_gradient()
            if counts:
                self._append(number, arm.name, **row)
        self._meeting.meet()
        started, cpu = time.perf_counter(), time.process_time()
        time.sleep(_IDLE_SECONDS)
        if counts:
            cpu = time.process_time() - cpu
            self._append(number, IDLE, seconds=time.perf_counter() - started, cpu_seconds=cpu)

    def _append(self, number: int, arm: str, **values: float) -> None:
        zeros = {"steps": 0, "seconds": 0.0, "update_seconds": 0.0, "cpu_seconds": 0.0}
        self.rows.append(
            {
                "round": number,
                "arm": arm,
                "rank": self._environment.rank,
                "slow": self._slow,
                **zeros,
                "messages": 0,
                **values,
            }
        )

    def _run_slice(self, arm: Arm) -> dict[str, Any]:
        """Make the steps of one slice, and return what was measured."""
        warm_up, wanted = self.job.slice_steps(arm.name)
        waits = self._slow and not arm.in_lockstep  # for the others' steps, not for its own
        steps, update = 0, 0.0
        if waits:
            warm_up = 0
        messages = arm.messages

        def has_ended() -> bool:
            if arm.in_lockstep:
                return steps >= warm_up + wanted
            return self._meeting.have_done(self._compared)

        self._meeting.meet()
        started, cpu = time.perf_counter(), time.process_time()
        ended, cpu_end = started, cpu
        while not has_ended():
            if self._slow and not self._sleep(arm, has_ended):
                break
            update += self._make_step(arm)
            ended, cpu_end = time.perf_counter(), time.process_time()
            steps += 1
            if steps == warm_up:
                update, messages = 0.0, arm.messages
                started, cpu = time.perf_counter(), time.process_time()
            if steps == warm_up + wanted:
                self._meeting.report_done()
        if waits:  # its part of the time that the others took
            ended, cpu_end = time.perf_counter(), time.process_time()
        return {
            "steps": steps - warm_up,
            "seconds": ended - started,
            "update_seconds": update,
            "cpu_seconds": cpu_end - cpu,
            "messages": arm.messages - messages,
        }

    def _make_step(self, arm: Arm) -> float:
        """Make a step, and return the seconds behind its gradient."""
        started = time.perf_counter()
        arm.compute_gradient()
        computed = time.perf_counter()
        if not arm.shares_gradient:
            self._gradient_seconds.append(computed - started)
        arm.apply_gradient()
        return time.perf_counter() - computed

    def _sleep(self, arm: Arm, has_ended: Callable[[], bool]) -> bool:
        """Sleep as long as the straggler's next step is slower; False: the slice ended before."""
        left = self._sleep_left.pop(arm.name, None)
        if left is None:
            gradient = float(np.median(self._gradient_seconds))
            left = arm.workload.straggler.extra_seconds(arm.steps, gradient)
        end = time.perf_counter() + left
        while (left := end - time.perf_counter()) > 0:
            if has_ended():
                self._sleep_left[arm.name] = left
                return False
            time.sleep(min(left, _NAP_SECONDS))
        return True


def _require_same_start(arms: Sequence[Arm]) -> None:
    """Require that all arms in which this rank made a step had the same weights and first batch.

    Raises:
        ValueError: their first losses differ.
    """
    losses = {arm.name: arm.first_loss for arm in arms if arm.steps}
    if not np.allclose(list(losses.values()), arms[0].first_loss, rtol=1e-4):
        raise ValueError(f"the arms did not begin alike: first losses {losses}")


def main(directory: str) -> int:
    """Measure what the plan in `directory` says, and leave the samples of all ranks there."""
    launch.enable_stack_dump()
    world.log_to_stderr()
    environment = world.start()
    environment.abort_on_exception()
    return environment.run(lambda: _measure(Path(directory), environment))


def _measure(directory: Path, environment: world.World) -> int:
    job = StepJob(**json.loads((directory / PLAN).read_text(encoding="utf-8")))
    rank = StepRank(job, environment, directory)
    all_cores = os.sched_getaffinity(0)
    started, busy, cpu = time.monotonic(), busy_seconds(all_cores), time.process_time()
    rank.run()
    comm = environment.comm
    own = comm.allreduce(time.process_time() - cpu)
    capacity = (time.monotonic() - started) * cores()
    others = max(0.0, (busy_seconds(all_cores) - busy - own) / capacity)
    gathered = comm.gather(rank.rows)
    if gathered is not None:
        rows = [row for rows in gathered for row in rows]
        text = json.dumps({"rows": rows, "cpu_others": others})
        (directory / OUTPUT).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
