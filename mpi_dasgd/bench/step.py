"""``bench step``: the time of a training step with an exchange, against loops without any.

All arms run in the same processes of one job, interleaved in short slices, in an order that rotates
from round to round. The machine's noise meets all of them alike: a ratio compares an arm with a
reference in the same round, and the quartiles of these ratios say how far to trust their median.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mpi_dasgd.bench import machine
from mpi_dasgd.bench.job_series import measure_all, run_ranks, warn_of_others
from mpi_dasgd.bench.meeting_point import MeetingPoint
from mpi_dasgd.bench.options import add_output_options
from mpi_dasgd.bench.sample_store import columns_of, read_samples, samples_path, write_samples
from mpi_dasgd.bench.step_job import ARMS, MEETING_POINT, OPTIMIZERS, OUTPUT, PLAN, StepJob
from mpi_dasgd.bench.step_plan import FULL_PLAN, QUICK_PLAN, StepPlan
from mpi_dasgd.bench.step_report import LEGEND, SCENARIO, markdown, summarize, table
from mpi_dasgd.bench.training_plan import cores
from mpi_dasgd.errors import UserError
from mpi_dasgd.world import print_message

__all__ = ["main"]

_MEMORY_SHARE = 0.7  # of what is free, for the arms that are in memory together


class _Measured(NamedTuple):
    """Rows of one job, and the share of the cores that other programs used meanwhile."""

    rows: list[dict[str, Any]]
    cpu_others: float


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments and return the exit code.

    Raises:
        UserError: an argument is wrong, or memory is short.
    """
    options = _parser().parse_args(arguments)
    if options.samples is not None:
        return _report(options, Path(options.samples), 0)
    given = {name: value for name in FULL_PLAN if (value := getattr(options, name)) is not None}
    plan = StepPlan(**{**(QUICK_PLAN if options.quick else FULL_PLAN), **given})
    free = machine.available_memory()
    jobs = list(plan.jobs(None if free is None else _MEMORY_SHARE * free))
    path = samples_path("step", options.out)
    rows: list[dict[str, Any]] = []
    others: list[float] = []

    def measure(job: StepJob) -> None:
        measured = _measure(job)
        rows.extend(measured.rows)
        others.append(measured.cpu_others)
        settings = {"cores": cores(), "cpu_others": others}
        write_samples(path, "step", columns_of(rows), settings)  # of the jobs so far

    _, code = measure_all(jobs, measure)
    if not rows:
        return code
    warn_of_others(others)
    return _report(options, path, code)


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="mpi-dasgd bench step",
        description=__doc__,
        epilog="; ".join(f"{name}: {words}" for name, words in ARMS.items()),
    )
    add = parser.add_argument
    tasks = (
        "T1 (CNN, 10 k parameters, 2 ms per step), T2 (MLP, 25.1 M, 110 ms), T3 (CNN, 1.2 M, 45 ms)"
    )
    add("--tasks", type=names, help=f"{tasks} [all]")
    add("--ranks", type=numbers, help="numbers of ranks [2,4]")
    add("--optimizers", type=names, help=f"{', '.join(OPTIMIZERS)} [SGD,AdamW]")
    add(
        "--stragglers", type=names, help="none, sK: the last rank sleeps, K times slower [none,s10]"
    )
    add("--arms", type=names, help="loops to compare, named below; alone is one always [all]")
    add("--codec", help="codec of the arms that exchange models [auto]")
    add("--rounds", type=int, help="slices of each arm [40 for T1, 12 for T2, 20 for T3]")
    add(
        "--quick",
        action="store_true",
        help="defaults of a first look: T1, SGD, 2 ranks, no straggler, 10 rounds",
    )
    add("--markdown", action="store_true", help="print the table of README.md")
    add("--samples", metavar="FILE", help="report what an earlier run has measured")
    add_output_options(parser)
    return parser


def _measure(job: StepJob) -> _Measured:
    """Run one job in a temporary directory and return its raw samples."""
    with tempfile.TemporaryDirectory(prefix="mpi-dasgd-bench-") as name:
        directory = Path(name)
        (directory / PLAN).write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        MeetingPoint.create(directory / MEETING_POINT, job.ranks)
        run_ranks(
            ["-m", "mpi_dasgd.bench.step_rank", name],
            job.ranks,
            directory / "log",
            expected_seconds=2 * job.expected_seconds,  # a busy machine
            env={"CUDA_VISIBLE_DEVICES": ""},
        )
        output = json.loads((directory / OUTPUT).read_text(encoding="utf-8"))
    scenario = {name: getattr(job, name) for name in SCENARIO}
    fixed = {**scenario, "codec": job.codec, "cores": cores()}
    return _Measured([{**fixed, **row} for row in output["rows"]], output["cpu_others"])


def _report(options: argparse.Namespace, path: Path, code: int) -> int:
    """Print the report of the raw samples in `path`, draw it beside them, and return `code`."""
    rows = summarize(_read(path))
    picture = path.with_suffix(".png") if find_spec("matplotlib") else None
    if picture is None:
        print_message("no picture: matplotlib is missing, which `mpi_dasgd[report]` installs")
    else:
        from mpi_dasgd.bench.step_picture import draw

        draw(rows, picture)
    if options.json:
        drawn = None if picture is None else str(picture)
        print(json.dumps({"rows": rows, "samples": str(path), "picture": drawn}))
    else:
        print("\n".join(markdown(rows) if options.markdown else [*table(rows), LEGEND]))
        print(f"raw samples: {path}" + ("" if picture is None else f", picture: {picture}"))
    return code


def _read(path: Path) -> Mapping[str, Any]:
    try:
        columns, attributes = read_samples(path)
    except OSError as error:
        raise UserError(f"bench step: --samples: {path} cannot be read ({error})") from error
    if attributes["bench"] != "step":
        raise UserError(
            f"bench step: --samples: {path} has samples of `bench {attributes['bench']}`"
        )
    return columns
