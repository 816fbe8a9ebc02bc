"""``bench training``: samples per second of each algorithm, as a share of no exchange at all.

Only shares compare: a machine's speed drifts by more than the algorithms differ. So every algorithm
is measured beside `alone`: the same ranks, seed, batches and straggler, without any exchange.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from mpi_dasgd.bench.measurement import (
    TASKS,
    WARM_UP,
    JobFailed,
    Measurement,
    Result,
    Scenario,
    cores,
    measure,
)
from mpi_dasgd.bench.sample_store import samples_path, write_samples
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.world import print_message

__all__ = ["ALGORITHMS", "REFERENCE", "Plan", "main", "summarize", "table"]

REFERENCE = "alone"
ALGORITHMS = (REFERENCE, "adpsgd", "allreduce", "ddp")
CODECS = tuple(f"adpsgd:{name}" for name in get_args(CodecConfig.model_fields["name"].annotation))
FULL: dict[str, Any] = {
    "tasks": tuple(TASKS),
    "ranks": (2, 4),
    "stragglers": ("none", "s4", "s10", "c4", "c10"),
    "algorithms": ALGORITHMS,
    "repeats": 3,
    "seconds": None,
}
QUICK = {**FULL, "tasks": ("T1",), "ranks": (2,), "stragglers": ("none", "s10")}
QUICK |= {"repeats": 1, "seconds": 3.0}
OTHERS = 0.1  # share of the cores that others may use

_LEGEND = """\
share: of the samples/s of `alone` in the same repeat, median; spread: largest minus smallest share
cpu, others: share of all cores that the job, and everything else, kept busy
MB/step: counted payload that leaves a rank; s to 95 %: of the mean model, and of the worst rank"""


@dataclass(frozen=True)
class Plan:
    """All measurements of one run of the benchmark.

    Args:
        tasks, ranks, stragglers, algorithms: all combinations are measured, the reference always.
        repeats: measurements of each.
        seconds: length of each; None: as the task says.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    tasks: Sequence[str]
    ranks: Sequence[int]
    stragglers: Sequence[str]
    algorithms: Sequence[str]
    repeats: int
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in self.tasks:
            _known("--tasks", name, TASKS)
        for name in self.algorithms:
            _known("--algorithms", name, (*ALGORITHMS, *CODECS))
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
    def cells(self) -> list[Scenario]:
        """Every combination of task, ranks and straggler, once."""
        return list(
            dict.fromkeys(
                Scenario(task, ranks, straggler)
                for task in self.tasks
                for ranks in self.ranks
                for straggler in self.stragglers
            )
        )

    def measurements(self) -> Iterator[Measurement]:
        """Yield the measurements: all cells, then again; a cell's algorithms in rotating order.

        What is compared lies close in time, and no algorithm always comes first.
        """
        algorithms = list(dict.fromkeys([REFERENCE, *self.algorithms]))
        for repeat in range(self.repeats):
            first = repeat % len(algorithms)
            for cell in self.cells:
                seconds = TASKS[cell.task].seconds if self.seconds is None else self.seconds
                for algorithm in algorithms[first:] + algorithms[:first]:
                    yield Measurement(cell, algorithm, repeat, seconds)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with the arguments after ``bench training``; return the exit code."""
    options = _parser().parse_args(arguments)
    given = {name: getattr(options, name) for name in FULL if getattr(options, name) is not None}
    plan = Plan(**{**(QUICK if options.quick else FULL), **given})
    path = samples_path("training", options.out)
    results, code = _measure_all(list(plan.measurements()))
    if not results:
        return code
    write_samples(path, "training", columns(results), {"cores": cores(), "warm_up": WARM_UP})
    check_comparable(results)
    rows = summarize(results)
    if disturbed := sum(result.cpu_others > OTHERS for result in results):
        print_message(
            f"warning: in {disturbed} of {len(results)} measurements something else used more than "
            f"{OTHERS:.0%} of the cores; measure again when the machine is quiet"
        )
    if options.json:
        print(json.dumps({"rows": rows, "samples": str(path)}))
    else:
        print("\n".join(table(rows)))
        print(_LEGEND)
        print(f"raw samples: {path}")
    return code


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="mpi-dasgd bench training", description=__doc__)
    add = parser.add_argument
    tasks = (
        "T1 (CNN, 10 k parameters, 2 ms a step), T2 (MLP, 25.1 M, 110 ms), T3 (CNN, 1.2 M, 45 ms)"
    )
    stragglers = (
        "none, sK: the last rank sleeps to be K times slower, cK: it computes K times as much"
    )
    algorithms = (
        f"{REFERENCE} is always measured; ddp is torch's DistributedDataParallel over gloo; "
        "adpsgd:lattice4 has that codec"
    )
    add("--tasks", type=names, help=f"{tasks} [all]")
    add("--ranks", type=numbers, help="numbers of ranks [2,4]")
    add(
        "--stragglers",
        type=names,
        help=f"{stragglers} [none,s4,s10,c4,c10]",
    )
    add("--algorithms", type=names, help=f"{algorithms} [all]")
    add("--seconds", type=float, help="length of a measurement [as the task needs]")
    add("--repeats", type=int, help="measurements of each [3]")
    add("--out", help="directory for the raw samples [bench-results]")
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--quick",
        action="store_true",
        help="defaults of a first look: T1, 2 ranks, none and s10, once, 3 s",
    )
    return parser


def _measure_all(plan: Sequence[Measurement]) -> tuple[list[Result], int]:
    """Measure; return the results and the exit code: 0, 1 if a job failed, 128 + signal."""
    expected = [measurement.expected_seconds for measurement in plan]
    print_message(f"{len(plan)} measurements, about {_minutes(sum(expected))}")
    results: list[Result] = []
    code = 0
    begun = time.monotonic()
    for number, measurement in enumerate(plan):
        pace = (time.monotonic() - begun) / sum(expected[:number]) if number else 1.0
        left = f"about {_minutes(pace * sum(expected[number:]))} left"
        what = f"{measurement.cell} {measurement.algorithm}"
        print_message(f"{number + 1}/{len(plan)} {what}, repeat {measurement.repeat + 1}: {left}")
        try:
            results.append(measure(measurement))
        except KeyboardInterrupt as interrupt:
            print_message("interrupted; what was measured so far counts")
            return results, int(interrupt.args[0])
        except JobFailed as error:
            print_message(f"{what}: {error}")
            code = 1
    return results, code


def check_comparable(results: Iterable[Result]) -> None:
    """See that all algorithms of a cell and repeat began with the same weights and batches.

    Raises:
        ValueError: their first losses differ.
    """
    found: dict[tuple[Any, int], Result] = {}
    for result in results:
        key = (result.measurement.cell, result.measurement.repeat)
        first = found.setdefault(key, result)
        if not np.allclose(first.first_losses, result.first_losses, rtol=1e-4):
            raise ValueError(
                f"{key[0]}: {first.measurement.algorithm} and {result.measurement.algorithm} did "
                f"not begin alike: first losses {first.first_losses} and {result.first_losses}"
            )


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return one row per cell and algorithm, in the order measured; None where nothing applies.

    A share is that of the same repeat's `alone`. Medians over the repeats; `share_spread` is the
    largest minus the smallest share, None of a single repeat.
    """
    groups: dict[tuple[Any, str], list[Result]] = {}
    alone: dict[tuple[Any, int], float] = {}
    for result in results:
        measurement = result.measurement
        groups.setdefault((measurement.cell, measurement.algorithm), []).append(result)
        if measurement.algorithm == REFERENCE:
            alone[measurement.cell, measurement.repeat] = result.samples_per_s
    rows = []
    for (cell, algorithm), group in groups.items():
        shares = [
            result.samples_per_s / alone[key]
            for result in group
            if (key := (cell, result.measurement.repeat)) in alone
        ]
        rows.append(
            {
                "task": cell.task,
                "ranks": cell.ranks,
                "straggler": cell.straggler,
                "algorithm": algorithm,
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
    values = list(values)
    median = float(np.median(values)) if values else math.nan
    return median if math.isfinite(median) else None


def columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Return the raw samples: one row per measurement, rank and window."""
    found: dict[str, list[Any]] = {}
    for result in results:
        measurement = result.measurement
        same = {
            "task": measurement.cell.task,
            "ranks": measurement.cell.ranks,
            "straggler": measurement.cell.straggler,
            "algorithm": measurement.algorithm,
            "repeat": measurement.repeat,
            "bytes_per_step": result.bytes_per_step,
            "seconds_to_mean": result.seconds_to_mean,
            "seconds_to_worst": result.seconds_to_worst,
        }
        for (rank, window), samples in np.ndenumerate(result.samples):
            row = {
                **same,
                "rank": rank,
                "begin_s": result.edges[window],
                "end_s": result.edges[window + 1],
                "samples": samples,
                "cpu_s": result.cpu_s[rank, window],
                "busy_s": result.busy_s[window],
            }
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows as lines of text."""
    heads = ("samples/s", "share", "spread", "cpu", "others", "MB/step", "s to 95 %", "worst")
    lines = [f"{'':<14}{'':<17}" + "".join(f"{head:>11}" for head in heads)]
    before = None
    for row in rows:
        cell = f"{row['task']} n={row['ranks']} {row['straggler']}"
        megabytes = None if row["bytes_per_step"] is None else row["bytes_per_step"] / 1e6
        values = (
            (row["samples_per_s"], ",.0f"), (row["share_of_alone"], ".3f"),
            (row["share_spread"], ".3f"), (row["cpu_busy"], ".2f"), (row["cpu_others"], ".2f"),
            (megabytes, ".4g"), (row["seconds_to_95_mean"], ".2f"),
            (row["seconds_to_95_worst"], ".2f"),
        )  # fmt: skip
        texts = ["-" if value is None else format(value, form) for value, form in values]
        name = cell if cell != before else ""
        lines.append(f"{name:<14}{row['algorithm']:<17}" + "".join(f"{t:>11}" for t in texts))
        before = cell
    return lines


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _known(option: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        raise UserError(
            f"bench training: {option}: {name!r} is not known{nearest(name, valid)} "
            f"(valid: {', '.join(valid)})"
        )
