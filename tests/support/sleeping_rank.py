"""A rank that sleeps outside MPI until another has read of it, which needs no call of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SleepingRank"]

LIMIT = 20.0  # seconds of sleep, if no rank can read


class SleepingRank:
    """What the ranks of a job tell each other, through files, of the one that sleeps.

    Args:
        folder: an empty one that all ranks share; None: it sleeps for a fixed time.
    """

    def __init__(self, folder: str | None) -> None:
        self._asleep, self._was_read = (
            None if folder is None else Path(folder, name) for name in ("asleep", "read")
        )

    def sleep(self, seconds: float) -> tuple[float, float]:
        """Sleep for at least `seconds`; return when it began and ended."""
        started = time.monotonic()
        if self._asleep is not None:
            self._asleep.touch()
        time.sleep(seconds)
        if self._was_read is not None:
            while not self._was_read.exists() and time.monotonic() - started < LIMIT:
                time.sleep(0.01)
        return started, time.monotonic()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Wake it up after a read of it in the body, if that has begun while it slept."""
        asleep = self._asleep is not None and self._asleep.exists()
        yield
        if asleep and self._was_read is not None:
            self._was_read.touch()
