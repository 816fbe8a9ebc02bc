"""Jobs that a benchmark runs one after the other, and how they fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from mpi_dasgd import launch
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.world import print_message

__all__ = ["MAX_OTHERS", "JobFailed", "measure_all", "run_ranks", "warn_of_others"]

MAX_OTHERS = 0.1
"""Share of the cores that other programs may use before the user is warned."""

# Seconds that a job may take beyond its expected duration.
_GRACE_SECONDS = 180.0
# Characters of a failed job's output in the error message.
_LOG_TAIL = 3000


class JobFailed(MpiDasgdError):
    """A measured job failed."""


class Planned(Protocol):
    """A job to measure, whose text names it."""

    @property
    def expected_seconds(self) -> float:
        """Expected duration of the job."""


Job = TypeVar("Job", bound=Planned)
Result = TypeVar("Result")


def measure_all(plan: Sequence[Job], measure: Callable[[Job], Result]) -> tuple[list[Result], int]:
    """Measure jobs, and tell the user before each how long the rest will take.

    Args:
        plan: jobs, in their order.
        measure: runs one of them; raises `JobFailed`, or KeyboardInterrupt with an exit code.

    Returns:
        The results, and the exit code: 0, 1 if a job failed, or 128 + signal.
    """
    expected = [job.expected_seconds for job in plan]
    print_message(f"{len(plan)} measurements, about {_duration(sum(expected))}")
    results: list[Result] = []
    code = 0
    start = time.monotonic()
    for number, job in enumerate(plan):
        pace = (time.monotonic() - start) / sum(expected[:number]) if number else 1.0
        left = f"about {_duration(pace * sum(expected[number:]))} left"
        print_message(f"{number + 1}/{len(plan)} {job}: {left}")
        try:
            results.append(measure(job))
        except KeyboardInterrupt as interrupt:
            print_message("interrupted; what was measured so far counts")
            return results, int(interrupt.args[0])
        except JobFailed as error:
            print_message(f"{job}: {error}")
            code = 1
    return results, code


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def run_ranks(
    arguments: Sequence[str],
    ranks: int,
    log: Path,
    *,
    expected_seconds: float,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a program on `ranks` ranks, each with one thread.

    Args:
        arguments: those of Python: ``-m``, a module, and what it takes.
        ranks: number of ranks.
        log: file for what they print.
        expected_seconds: expected duration; the job is ended three minutes later.
        env: further environment variables of the ranks.

    Raises:
        JobFailed: the job failed; the message contains the end of its output.
        UserError: the job refused its input.
        KeyboardInterrupt: a signal ended the job; the argument is the exit code.
    """
    with log.open("w") as output:
        outcome = launch.run(
            [sys.executable, *arguments],
            ranks,
            needs_all=True,
            timeout=expected_seconds + _GRACE_SECONDS,
            env={"OMP_NUM_THREADS": "1", **(env or {})},
            stdout=output,
            stderr=output,
        )
    if outcome.code > 128 and outcome.ended_by not in (None, "timeout"):
        raise KeyboardInterrupt(outcome.code)
    if set(outcome.codes) != {0}:
        text = log.read_text(errors="replace")[-_LOG_TAIL:]
        error_cls = UserError if outcome.code == UserError.exit_code else JobFailed
        raise error_cls(f"{outcome.describe() or 'the job was refused'}\n{text}")


def warn_of_others(shares: Sequence[float]) -> None:
    """Warn the user if other programs used more than `MAX_OTHERS` of the cores.

    Args:
        shares: share of the cores that they used in each measurement.
    """
    if disturbed := sum(share > MAX_OTHERS for share in shares):
        print_message(
            f"warning: in {disturbed} of {len(shares)} measurements something else used more than "
            f"{MAX_OTHERS:.0%} of the cores; measure again when the machine is quiet"
        )
