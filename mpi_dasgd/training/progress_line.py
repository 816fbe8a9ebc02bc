"""Progress line of a run: replaced on a terminal, printed line by line in a batch job."""

from __future__ import annotations

import os
import sys
import time

__all__ = ["ProgressLine"]


class ProgressLine:
    """Prints the state of a run at intervals, from one rank.

    Args:
        enabled: whether this rank prints.
        seconds: interval of plain lines; on a terminal the line is replaced four times per second.
    """

    def __init__(self, enabled: bool, seconds: float = 5.0) -> None:
        self._enabled = enabled
        # `mpi-dasgd launch` sees the terminal that the ranks, behind pipes, do not.
        self._replaces = os.environ.get("MPI_DASGD_TERMINAL") == "1" or sys.stdout.isatty()
        self._interval = 0.25 if self._replaces else seconds
        self._due = time.monotonic()
        self._width = 0

    @property
    def due(self) -> bool:
        """Whether this rank prints, and `show` is due."""
        return self._enabled and time.monotonic() >= self._due

    def show(self, line: str) -> None:
        """Print or replace the line."""
        self._due = time.monotonic() + self._interval
        if self._replaces:
            print(f"\r{line:<{self._width}}", end="", flush=True)
            self._width = len(line)
        else:
            print(line, flush=True)

    def end(self, line: str) -> None:
        """Print the last line."""
        if self._enabled:
            self.show(line)
            if self._replaces:
                print(flush=True)
