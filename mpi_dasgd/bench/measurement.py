"""One measurement of `bench training`: runs a job of some seconds and reads its files."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mpi_dasgd.bench.job_series import JobFailed, run_ranks
from mpi_dasgd.bench.measured_rank import cpu_path
from mpi_dasgd.bench.training_plan import TASKS, Measurement, cores
from mpi_dasgd.storage.results import results_path
from mpi_dasgd.storage.runfile import RankRecord, rank_path, read_run_file

__all__ = ["WARM_UP", "Result", "common_windows", "counts_per_window", "measure"]

WARM_UP = 0.1
"""Share of a measurement that does not count."""

# Equal parts of the time that counts.
_WINDOWS = 20


@dataclass(frozen=True)
class Result:
    """Raw samples of one measurement.

    Attributes:
        measurement: what was measured.
        edges: limits of the windows, (windows + 1,), in seconds of training; all ranks train then.
        samples: samples processed, (ranks, windows).
        cpu_s: CPU seconds used, (ranks, windows).
        busy_s: CPU seconds used by all programs on the job's cores, (windows,).
        bytes_per_step: payload bytes that leave a rank per step; NaN if they are not counted.
        seconds_to_mean, seconds_to_worst: seconds until the mean model, and until every rank's
            model, reached the target of the task; inf if that did not happen, NaN without a
            target.
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
        """CPU time of all other programs, as the same share; it disturbs the measurement."""
        return max(0.0, float(self.busy_s.sum()) / self._seconds / cores() - self.cpu_busy)

    @property
    def _seconds(self) -> float:
        return float(self.edges[-1] - self.edges[0])


def measure(measurement: Measurement) -> Result:
    """Run one job in a temporary directory and return its raw samples.

    Raises:
        JobFailed: the job failed; the message contains the end of its output.
        UserError: the job refused its input.
        KeyboardInterrupt: a signal ended the job; the argument is the exit code.
    """
    with tempfile.TemporaryDirectory(prefix="mpi-dasgd-bench-") as name:
        directory = Path(name)
        config = measurement.config(directory)
        config_file = directory / "config.json"
        config_file.write_text(config.model_dump_json(), encoding="utf-8")
        # No GPU where the CPU is measured.
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if measurement.device == "cpu" else {}
        run_ranks(
            ["-m", "mpi_dasgd.bench.measured_rank", measurement.algorithm, str(config_file)],
            measurement.scenario.ranks,
            directory / "log",
            expected_seconds=measurement.expected_seconds,
            env=hidden,
        )
        return _read(measurement, config.run_directory)


def _read(measurement: Measurement, directory: Path) -> Result:
    ranks = range(measurement.scenario.ranks)
    records = [read_run_file(rank_path(directory, rank)) for rank in ranks]
    tables = [record.tables["train"] for record in records]
    edges = common_windows([table["time_s"] for table in tables], WARM_UP * measurement.seconds)
    # Per rank: seconds of training, its CPU seconds, and those of all programs on its cores.
    meters = [np.load(cpu_path(directory, rank)) for rank in ranks]
    return Result(
        measurement=measurement,
        edges=edges,
        samples=np.array(
            [counts_per_window(edges, table["time_s"], table["samples"]) for table in tables]
        ),
        cpu_s=np.array([counts_per_window(edges, meter[:, 0], meter[:, 1]) for meter in meters]),
        busy_s=counts_per_window(edges, meters[0][:, 0], meters[0][:, 2]),
        bytes_per_step=_bytes_per_step(measurement.algorithm, records),
        **_seconds_to_target(measurement, directory),
        first_losses=tuple(float(table["loss"][0]) for table in tables),
    )


def common_windows(times: Sequence[np.ndarray], warm_up: float) -> np.ndarray:
    """Return the limits of the windows in which all ranks train, shape (windows + 1,), in seconds.

    Args:
        times: times at which each rank finished its steps, shape (steps,) each, in seconds.
        warm_up: seconds to leave out at the beginning; at least the first step of each rank.

    Raises:
        JobFailed: a rank made too few steps.
    """
    begin = max(warm_up, *(time[0] for time in times))
    end = min(time[-1] for time in times)
    if min(np.count_nonzero((time > begin) & (time <= end)) for time in times) < 2:
        raise JobFailed("a rank made fewer than two steps after the warm-up: give more --seconds")
    return np.linspace(begin, end, _WINDOWS + 1)


def counts_per_window(edges: np.ndarray, times: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the growth of a counter in each window, shape (windows,).

    The counter is interpolated linearly between its readings.

    Args:
        edges: limits of the windows, shape (windows + 1,), in seconds.
        times: times of the readings, shape (readings,), in seconds.
        counts: readings of the counter, shape (readings,).
    """
    return np.diff(np.interp(edges, times, counts))


def _bytes_per_step(algorithm: str, records: Sequence[RankRecord]) -> float:
    """Return the payload bytes per step and rank; NaN if they were not counted.

    Bytes that a rank fetched with Get count as sent by the rank they came from.
    """
    # MPI does not tell what its allreduce sends.
    if algorithm == "allreduce":
        return math.nan
    counters = [record.counters for record in records]
    if any("bytes_sent" not in counter for counter in counters):
        return math.nan
    total = sum(c["bytes_sent"] + c.get("bytes_received", 0) for c in counters)
    return total / sum(c["steps"] for c in counters)


def _seconds_to_target(measurement: Measurement, directory: Path) -> dict[str, float]:
    target = TASKS[measurement.scenario.task].target
    if target is None:
        return {"seconds_to_mean": math.nan, "seconds_to_worst": math.nan}
    with h5py.File(results_path(directory), "r") as file:
        table = {name: file["consensus"][name][:] for name in file["consensus"]}
    seconds = {}
    for model in ("mean", "worst"):
        reached = table["time_s"][table[f"{model}_test_accuracy"] >= target]
        seconds[f"seconds_to_{model}"] = float(reached[0]) if len(reached) else math.inf
    return seconds
