"""How a job of several ranks ended, and the verdict on it."""

from __future__ import annotations

import signal
from dataclasses import dataclass

__all__ = ["TIMED_OUT", "Outcome"]

TIMED_OUT = 124  # exit code after the time limit, as of coreutils' timeout


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        codes: exit status of each rank as a shell gives it (128 + signal if killed); None: unknown.
        first: rank that failed first, an exit code of its own before a kill; None: none is known.
            Of a job that ended by a loss: the rank that was lost.
        launcher: exit status of the launcher.
        ended_by: None, the signal that was passed on, "timeout", or "loss": a rank was killed while
            others waited for it.
    """

    codes: tuple[int | None, ...]
    first: int | None
    launcher: int
    ended_by: signal.Signals | str | None

    @property
    def code(self) -> int:
        """Exit code of the job, as `launch` returns it."""
        codes = set(self.codes)
        if self.ended_by == "timeout":
            return TIMED_OUT
        if codes == {0}:
            return 0
        if isinstance(self.ended_by, signal.Signals):
            return 128 + self.ended_by
        first = self.codes[self.first] if self.first is not None else None
        if self.ended_by == "loss" and first is not None:
            return first
        if None in codes:  # an aborted job: the launcher has its code
            codes.add(self.launcher % 256)
        for special in (2, 3):  # bad input, diverged
            if special in codes:
                return special
        if first is not None and first <= 128:
            return first
        if None in codes:
            return self.launcher % 256 or 1
        return 0 if 0 in codes else first or 1  # all failures are kills

    def describe(self) -> str:
        """One line for the user; empty if there is nothing to add to what the program said."""
        if self.ended_by == "timeout":
            return "time limit reached: all ranks were stopped"
        if self.ended_by is None and (set(self.codes) == {0} or set(self.codes) == {2}):
            return ""
        ranks = sorted(range(len(self.codes)), key=lambda rank: rank != self.first)
        if self.ended_by == "loss":
            lost = self._endings(ranks[:1])
            others = self._endings(ranks[1:])
            return f"{lost} before the others could do without it, so they were ended: {others}"
        text = self._endings(ranks)
        if isinstance(self.ended_by, signal.Signals):
            return f"{self.ended_by.name} was passed on to the ranks: {text}"
        return text if self.code else f"warning: {text}"

    def _endings(self, ranks: list[int]) -> str:
        endings: dict[str, list[str]] = {}
        for rank in ranks:
            endings.setdefault(self._ending(self.codes[rank]), []).append(str(rank))
        return "; ".join(
            f"rank{'s' * (len(same) > 1)} {', '.join(same)} {ending}"
            for ending, same in endings.items()
        )

    def _ending(self, code: int | None) -> str:
        if code is None:
            return f"left no exit status (the launcher ended with {self.launcher})"
        if code <= 128:
            return f"ended with exit code {code}"
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:  # a number without a name
            return f"ended with status {code}"
