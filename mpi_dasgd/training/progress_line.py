"""The progress of a run: one living line on a terminal, plain lines in a batch job."""

from __future__ import annotations

import os
import sys
import time

__all__ = ["ProgressLine"]


class ProgressLine:
    """Prints the state of a run now and then, from one rank.

    Args:
        enabled: whether this rank prints.
        seconds: between two plain lines; a living line changes four times a second.
    """

    def __init__(self, enabled: bool, seconds: float = 5.0) -> None:
        self._enabled = enabled
        # `mpi-dasgd launch` sees the terminal that the ranks, behind pipes, do not.
        self._living = os.environ.get("MPI_DASGD_TERMINAL") == "1" or sys.stdout.isatty()
        self._interval = 0.25 if self._living else seconds
        self._due = time.monotonic()
        self._width = 0

    @property
    def due(self) -> bool:
        """Whether it is time for `show`."""
        return self._enabled and time.monotonic() >= self._due

    def show(self, line: str) -> None:
        """Print or replace the line."""
        self._due = time.monotonic() + self._interval
        if self._living:
            print(f"\r{line:<{self._width}}", end="", flush=True)
            self._width = len(line)
        else:
            print(line, flush=True)

    def end(self, line: str) -> None:
        """Print the last line."""
        if self._enabled:
            self.show(line)
            if self._living:
                print(flush=True)
