"""Report of `bench training`: shares of the reference's throughput, raw samples, and the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mpi_dasgd.bench.gpu_device import TAKE_TURNS
from mpi_dasgd.bench.measurement import Result
from mpi_dasgd.bench.sample_store import columns_of
from mpi_dasgd.bench.training_plan import REFERENCE, Scenario

__all__ = ["LEGEND", "columns", "require_same_start", "shared_gpus", "summarize", "table"]

LEGEND = """\
share: of the samples/s of `alone` in the same repeat, median; spread: largest minus smallest share
cpu, others: share of all cores that the job, and everything else, kept busy
MB/step: counted payload that leaves a rank; s to 95 %: of the mean model, and of the worst rank"""


def require_same_start(results: Iterable[Result]) -> None:
    """Require that all algorithms of a scenario and repeat had the same weights and first batch.

    Raises:
        ValueError: their first losses differ.
    """
    first_results: dict[tuple[Scenario, int], Result] = {}
    for result in results:
        key = (result.measurement.scenario, result.measurement.repeat)
        first = first_results.setdefault(key, result)
        if not np.allclose(first.first_losses, result.first_losses, rtol=1e-4):
            raise ValueError(
                f"{key[0]}: {first.measurement.algorithm} and {result.measurement.algorithm} did "
                f"not begin alike: first losses {first.first_losses} and {result.first_losses}"
            )


def summarize(results: Sequence[Result], gpus: int = 0) -> list[dict[str, Any]]:
    """Return one row per scenario and algorithm, in the order measured.

    Values are medians over the repeats, and None where there is none. A share compares with
    `REFERENCE` in the same repeat; `share_spread` is the largest minus the smallest share, None
    for a single repeat; `shares_gpu` says that ranks took turns on a GPU.

    Args:
        results: results of all measurements.
        gpus: number of GPUs that they ran on; 0: on the CPU.
    """
    groups: dict[tuple[Scenario, str], list[Result]] = {}
    reference: dict[tuple[Scenario, int], float] = {}
    for result in results:
        measurement = result.measurement
        groups.setdefault((measurement.scenario, measurement.algorithm), []).append(result)
        if measurement.algorithm == REFERENCE:
            reference[measurement.scenario, measurement.repeat] = result.samples_per_s
    rows = []
    for (scenario, algorithm), group in groups.items():
        shares = [
            result.samples_per_s / reference[key]
            for result in group
            if (key := (scenario, result.measurement.repeat)) in reference
        ]
        rows.append(
            {
                "task": scenario.task,
                "ranks": scenario.ranks,
                "straggler": scenario.straggler,
                "algorithm": algorithm,
                "shares_gpu": 0 < gpus < scenario.ranks,
                "repeats": len(group),
                "samples_per_s": _median(result.samples_per_s for result in group),
                "share_of_alone": _median(shares),
                "share_spread": max(shares) - min(shares) if len(shares) > 1 else None,
                "cpu_busy": _median(result.cpu_busy for result in group),
                "cpu_others": _median(result.cpu_others for result in group),
                "bytes_per_step": _median(result.bytes_per_step for result in group),
                "seconds_to_95_mean": _median(result.seconds_to_mean for result in group),
                "seconds_to_95_worst": _median(result.seconds_to_worst for result in group),
            }
        )
    return rows


def _median(values: Iterable[float]) -> float | None:
    """Return the median, or None if it is not finite or there are no values."""
    values = list(values)
    median = float(np.median(values)) if values else math.nan
    return median if math.isfinite(median) else None


def columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Return the columns of the raw samples, one row per measurement, rank and window."""
    return columns_of(
        {
            "task": result.measurement.scenario.task,
            "ranks": result.measurement.scenario.ranks,
            "straggler": result.measurement.scenario.straggler,
            "algorithm": result.measurement.algorithm,
            "repeat": result.measurement.repeat,
            "bytes_per_step": result.bytes_per_step,
            "seconds_to_mean": result.seconds_to_mean,
            "seconds_to_worst": result.seconds_to_worst,
            "rank": rank,
            "begin_s": result.edges[window],
            "end_s": result.edges[window + 1],
            "samples": samples,
            "cpu_s": result.cpu_s[rank, window],
            "busy_s": result.busy_s[window],
        }
        for result in results
        for (rank, window), samples in np.ndenumerate(result.samples)
    )


def shared_gpus(rows: Sequence[dict[str, Any]], device: str, gpus: int) -> list[str]:
    """Return a line about each number of ranks whose speeds mean nothing: they shared a GPU.

    Args:
        rows: rows of `summarize`.
        device: name of the GPU.
        gpus: number of GPUs.
    """
    crowded = sorted({row["ranks"] for row in rows if row["shares_gpu"]})
    return [f"{ranks} ranks on {gpus} x {device}: {TAKE_TURNS}" for ranks in crowded]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the printed table, given the rows of `summarize`."""
    heads = ("samples/s", "share", "spread", "cpu", "others", "MB/step", "s to 95 %", "worst")
    lines = [f"{'':<14}{'':<17}" + "".join(f"{head:>11}" for head in heads)]
    previous = None
    for row in rows:
        scenario = str(Scenario(row["task"], row["ranks"], row["straggler"]))
        megabytes = None if row["bytes_per_step"] is None else row["bytes_per_step"] / 1e6
        values = (
            (row["samples_per_s"], ",.0f"),
            (row["share_of_alone"], ".3f"),
            (row["share_spread"], ".3f"),
            (row["cpu_busy"], ".2f"),
            (row["cpu_others"], ".2f"),
            (megabytes, ".4g"),
            (row["seconds_to_95_mean"], ".2f"),
            (row["seconds_to_95_worst"], ".2f"),
        )
        texts = ["-" if value is None else format(value, form) for value, form in values]
        name = scenario if scenario != previous else ""
        lines.append(f"{name:<14}{row['algorithm']:<17}" + "".join(f"{text:>11}" for text in texts))
        previous = scenario
    return lines
