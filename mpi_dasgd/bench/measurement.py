"""One measurement of `bench training`: a job of some seconds, and what it left."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mpi_dasgd import launch
from mpi_dasgd.bench.measured_rank import cpu_path
from mpi_dasgd.config import load
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.storage.results import results_path
from mpi_dasgd.storage.runfile import RankRecord, rank_path, read_run_file

__all__ = [
    "TASKS",
    "WARM_UP",
    "JobFailed",
    "Measurement",
    "Result",
    "Scenario",
    "common_windows",
    "cores",
    "measure",
    "within",
]

WARM_UP = 0.1  # share of a measurement that does not count
WINDOWS = 20  # equal parts of what counts
GRACE = 180.0  # seconds that a job may take beyond what is expected
MILESTONE_SECONDS = 0.02  # between two snapshots, where time to accuracy is measured

# What a job needs outside of the training, measured: in all, and of one core for each rank.
_START_SECONDS, _RANK_SECONDS = 1.0, 3.5


@dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        data, model, batch: as in section ``task`` of the configuration.
        seconds: length of a measurement: at least some 10 steps of a rank that is 10 times slower.
        target: test accuracy to reach; None where the data cannot be learnt.
        extra: core seconds that each rank of such a size needs in addition to start and end.
    """

    data: str
    model: str
    batch: int
    seconds: float
    target: float | None = None
    extra: float = 0.0


TASKS = {
    "T1": Task("digits", "cnn", 32, 6.0, target=0.95, extra=2.0),
    "T2": Task("random", "mlp_25m", 16, 20.0, extra=4.0),
    "T3": Task("random", "cnn_1m", 32, 10.0, extra=0.5),
}


@dataclass(frozen=True)
class Scenario:
    """A task on so many ranks; `straggler`: none, sK (the last rank sleeps) or cK (it computes)."""

    task: str
    ranks: int
    straggler: str

    @property
    def factor(self) -> int:
        """How many times slower the last rank is."""
        return 1 if self.straggler == "none" else int(self.straggler[1:])

    def __str__(self) -> str:
        return f"{self.task} n={self.ranks} {self.straggler}"


@dataclass(frozen=True)
class Measurement:
    """One job: an algorithm, or algorithm:codec, in a cell, for so many seconds.

    Repeats differ in their seed only.
    """

    cell: Scenario
    algorithm: str
    repeat: int
    seconds: float

    @property
    def expected_seconds(self) -> float:
        """About how long it takes, with start, evaluation and end."""
        each = _RANK_SECONDS + TASKS[self.cell.task].extra
        return self.seconds + _START_SECONDS + each * max(1.0, self.cell.ranks / cores())

    def config(self, directory: Path) -> Config:
        """Return the configuration of the job, its results to go into `directory`/run.

        That of a rival is the same, with an algorithm that it ignores.
        """
        cell, task = self.cell, TASKS[self.cell.task]
        algorithm, _, codec = self.algorithm.partition(":")
        if algorithm == "ddp":
            algorithm = "allreduce"
        points = 1 if task.target is None else max(1, round(self.seconds / MILESTONE_SECONDS))
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
            "evaluation.live": "false",
            "evaluation.count": points,
        }
        if cell.straggler != "none":
            settings |= {
                "straggler.distribution": "constant",
                "straggler.factor": cell.factor,
                "straggler.mode": "sleep" if cell.straggler[0] == "s" else "busy",
            }
        return load(None, (f"{key}={value}" for key, value in settings.items()))


class JobFailed(MpiDasgdError):
    """A measured job ended badly."""


@dataclass(frozen=True)
class Result:
    """What one measurement found.

    Attributes:
        measurement: what was measured.
        edges: limits of the windows, (windows + 1,), in seconds of training; all ranks train then.
        samples: samples processed, (ranks, windows).
        cpu_s: CPU seconds used, (ranks, windows).
        busy_s: CPU seconds that everything on the job's cores used, (windows,).
        bytes_per_step: payload that leaves a rank, per step and rank; nan if nobody counts it.
        seconds_to_mean, seconds_to_worst: until the mean model, and until every rank's model,
            reached the target of the task; inf if that did not happen, nan if there is no target.
        first_losses: loss of each rank's first batch.
    """

    measurement: Measurement
    edges: np.ndarray
    samples: np.ndarray
    cpu_s: np.ndarray
    busy_s: np.ndarray
    bytes_per_step: float
    seconds_to_mean: float
    seconds_to_worst: float
    first_losses: tuple[float, ...]

    @property
    def samples_per_s(self) -> float:
        """Samples per second of all ranks together."""
        return float(self.samples.sum()) / self._seconds

    @property
    def cpu_busy(self) -> float:
        """CPU time of all ranks, as a share of that of all cores."""
        return float(self.cpu_s.sum()) / self._seconds / cores()

    @property
    def cpu_others(self) -> float:
        """The same of everything else; what was measured is wrong by it."""
        return max(0.0, float(self.busy_s.sum()) / self._seconds / cores() - self.cpu_busy)

    @property
    def _seconds(self) -> float:
        return float(self.edges[-1] - self.edges[0])


def measure(measurement: Measurement) -> Result:
    """Run one job and read what it left.

    Raises:
        JobFailed: it ended badly; the message has the end of its output.
        UserError: it refused its input.
        KeyboardInterrupt: a signal ended it; the argument is the exit code.
    """
    with tempfile.TemporaryDirectory(prefix="mpi-dasgd-bench-") as name:
        directory = Path(name)
        config = measurement.config(directory)
        file = directory / "config.json"
        file.write_text(config.model_dump_json(), encoding="utf-8")
        log = directory / "log"
        with log.open("w") as output:
            outcome = launch.run(
                [
                    sys.executable,
                    "-m",
                    "mpi_dasgd.bench.measured_rank",
                    measurement.algorithm,
                    str(file),
                ],
                measurement.cell.ranks,
                needs_all=True,
                timeout=measurement.expected_seconds + GRACE,
                env={"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )
        if outcome.code > 128 and outcome.ended_by not in (None, "timeout"):
            raise KeyboardInterrupt(outcome.code)
        if set(outcome.codes) != {0}:
            text = log.read_text(errors="replace")[-3000:]
            kind = UserError if outcome.code == UserError.exit_code else JobFailed
            raise kind(f"{outcome.describe() or 'the job was refused'}\n{text}")
        return _read(measurement, config.run_directory)


def _read(measurement: Measurement, directory: Path) -> Result:
    ranks = range(measurement.cell.ranks)
    records = [read_run_file(rank_path(directory, rank)) for rank in ranks]
    trains = [record.tables["train"] for record in records]
    edges = common_windows([train["time"] for train in trains], WARM_UP * measurement.seconds)
    readings = [np.load(cpu_path(directory, rank)) for rank in ranks]
    return Result(
        measurement=measurement,
        edges=edges,
        samples=np.array([within(edges, train["time"], train["samples"]) for train in trains]),
        cpu_s=np.array([within(edges, each[:, 0], each[:, 1]) for each in readings]),
        busy_s=within(edges, readings[0][:, 0], readings[0][:, 2]),
        bytes_per_step=_bytes_per_step(measurement.algorithm, records),
        **_seconds_to_target(measurement, directory),
        first_losses=tuple(float(train["loss"][0]) for train in trains),
    )


def common_windows(times: Sequence[np.ndarray], warm_up: float) -> np.ndarray:
    """Return limits of `WINDOWS` windows in which all ranks train, (WINDOWS + 1,).

    Args:
        times: when each rank finished its steps, (steps,) each, in seconds.
        warm_up: seconds to leave out at the beginning; at least the first step of each rank.

    Raises:
        JobFailed: a rank made too few steps.
    """
    begin = max(warm_up, *(time[0] for time in times))
    end = min(time[-1] for time in times)
    if min(np.count_nonzero((time > begin) & (time <= end)) for time in times) < 2:
        raise JobFailed("a rank made fewer than two steps after the warm-up: give more --seconds")
    return np.linspace(begin, end, WINDOWS + 1)


def within(edges: np.ndarray, times: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return by how much `counts` grew in each window; it grows evenly between two times."""
    return np.diff(np.interp(edges, times, counts))


def _bytes_per_step(algorithm: str, records: Sequence[RankRecord]) -> float:
    """Return counted bytes: each that a rank got by itself has left another rank."""
    if algorithm == "allreduce":
        return math.nan  # MPI does not tell
    counted = [record.counters for record in records]
    if any("bytes_sent" not in counters for counters in counted):
        return math.nan
    total = sum(c["bytes_sent"] + c.get("bytes_received", 0) for c in counted)
    return total / sum(c["steps"] for c in counted)


def _seconds_to_target(measurement: Measurement, directory: Path) -> dict[str, float]:
    target = TASKS[measurement.cell.task].target
    if target is None:
        return {"seconds_to_mean": math.nan, "seconds_to_worst": math.nan}
    with h5py.File(results_path(directory), "r") as file:
        table = {name: file["consensus"][name][:] for name in file["consensus"]}
    seconds = {}
    for kind in ("mean", "worst"):
        reached = table["time"][table[f"{kind}_test_accuracy"] >= target]
        seconds[f"seconds_to_{kind}"] = float(reached[0]) if len(reached) else math.inf
    return seconds


def cores() -> int:
    """Return how many cores the job may use."""
    return len(os.sched_getaffinity(0))
