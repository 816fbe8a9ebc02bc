"""The end of a job of several ranks: exit statuses, cause, verdict and description."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mpi_dasgd.errors import UserError
from mpi_dasgd.launch.deadlock import CLOSED, CONSTRUCTING, Deadlock

__all__ = ["TIMED_OUT", "Cause", "Outcome"]

TIMED_OUT = 124  # exit code after the time limit, the same as that of coreutils' timeout

Cause: TypeAlias = "signal.Signals | Literal['timeout', 'loss', 'absence', 'end']"
"""What ended a job: a signal to the launching process, the time limit, or a deadlock of a kind."""

_PLACES = {CONSTRUCTING: " in mpi_dasgd.Decentralized(...)", CLOSED: " after training.close()"}


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        codes: exit status of each rank as a shell reports it (128 + signal if killed); None if
            unknown.
        first_failed: rank that failed first, where a rank that exited by itself precedes one that
            was killed; after a deadlock, the rank that the others waited for; None if no failure
            is known.
        launcher_code: exit status of the launcher.
        ended_by: what ended the job: the signal that was forwarded to the ranks, "timeout", or the
            kind of the deadlock; None if the ranks ended by themselves.
        deadlock: the deadlock that was ended, if one was.
        stage: stage in which the rank was that the others waited for.
    """

    codes: tuple[int | None, ...]
    first_failed: int | None
    launcher_code: int
    ended_by: Cause | None
    deadlock: Deadlock | None = None
    stage: str = ""

    @property
    def code(self) -> int:
        """Exit code of the job, as `launch` returns it."""
        codes = set(self.codes)
        if self.ended_by == "timeout":
            return TIMED_OUT
        if self.ended_by == "absence":
            return UserError.exit_code
        if codes == {0}:
            return 0
        if isinstance(self.ended_by, signal.Signals):
            return 128 + self.ended_by
        first = None if self.first_failed is None else self.codes[self.first_failed]
        if self.ended_by == "loss" and first is not None:
            return first
        if None in codes:  # an aborted job: only the launcher knows its exit code
            codes.add(self.launcher_code % 256)
        for special in (2, 3):  # bad input, diverged
            if special in codes:
                return special
        if first is not None and first <= 128:
            return first
        if None in codes:
            return self.launcher_code % 256 or 1
        return 0 if 0 in codes else first or 1  # every rank that failed was killed

    def describe(self) -> str:
        """Return one line for the user; empty if the output of the ranks has said everything."""
        if self.ended_by == "timeout":
            return "time limit reached: all ranks were stopped"
        if self.ended_by is None and (set(self.codes) == {0} or set(self.codes) == {2}):
            return ""
        ranks = sorted(range(len(self.codes)), key=lambda rank: rank != self.first_failed)
        if self.ended_by == "absence" and self.deadlock:
            return (
                f"error: {_name(self.deadlock.missing)} ended before "
                f"mpi_dasgd.Decentralized(...), for which ranks {list(self.deadlock.waiting)} "
                "wait; every rank must construct it"
            )
        if self.ended_by in ("loss", "end"):
            lost = self._describe_ranks(ranks[:1]) + _PLACES.get(self.stage, "")
            others = self._describe_ranks(ranks[1:])
            if self.ended_by == "loss":
                return f"{lost} before the others could do without it, so they were ended: {others}"
            prefix = "" if self.code else "warning: "
            return f"{prefix}{lost}, so that the others could not finalize MPI; {others}"
        text = self._describe_ranks(ranks)
        if isinstance(self.ended_by, signal.Signals):
            return f"{self.ended_by.name} was passed on to the ranks: {text}"
        return text if self.code else f"warning: {text}"

    def _describe_ranks(self, ranks: list[int]) -> str:
        """Return how `ranks` ended, with those that ended alike taken together."""
        groups: dict[str, list[int]] = {}
        for rank in ranks:
            groups.setdefault(self._describe_code(self.codes[rank]), []).append(rank)
        return "; ".join(f"{_name(group)} {description}" for description, group in groups.items())

    def _describe_code(self, code: int | None) -> str:
        if code is None:
            return f"left no exit status (the launcher ended with {self.launcher_code})"
        if code <= 128:
            return f"ended with exit code {code}"
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:  # not the number of a signal
            return f"ended with status {code}"


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
