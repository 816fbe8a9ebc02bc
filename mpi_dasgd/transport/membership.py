"""Board: what every rank tells all others about itself: heartbeats, samples processed, status."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable

from mpi_dasgd.errors import Unreachable
from mpi_dasgd.transport.control_words import (
    BEAT,
    GRADIENTS,
    LAST,
    SAMPLES,
    SPOKESMAN,
    STATUS,
    Words,
)

__all__ = ["FAILED", "FINISHED", "LEFT", "RUNNING", "Board"]

RUNNING, FINISHED, FAILED, LEFT = range(4)
"""Status: training, through with training but still absorbing, failed, gone for good."""

_LONGEST = 0.2  # seconds of silence that count between two looks


class Board:
    """This rank's notices, and the newest that it has seen of the others.

    Args:
        words: control words of all ranks. `beat` and `watch` may use another view than `words`,
            as they run in the courier's thread.
        rank, size: this rank, and how many there are.
        silence: seconds without a heartbeat after which a rank counts as dead.
    """

    def __init__(self, words: Words, rank: int, size: int, silence: float) -> None:
        self._words = words
        self._rank = rank
        self._silence = silence
        self._mine = {BEAT: 0, SAMPLES: 0, STATUS: RUNNING, LAST: 0, GRADIENTS: 0}
        self.samples = [0] * size
        self.gradients = [0] * size
        self.status = [RUNNING] * size
        self.dead: set[int] = set()
        self._beats = [-1] * size
        self._quiet = [0.0] * size
        self._watched = time.monotonic()

    def _set(self, index: int, value: int, words: Words | None = None) -> None:
        if value != self._mine[index]:
            (words or self._words).swap(self._rank, index, self._mine[index], value)
            self._mine[index] = value

    def report(self, samples: int) -> None:
        """Publish how many samples this rank has processed."""
        self._set(SAMPLES, samples)
        self.samples[self._rank] = samples

    def count(self, gradients: int) -> None:
        """Publish how many gradients this rank has computed."""
        self._set(GRADIENTS, gradients)
        self.gradients[self._rank] = gradients

    def recount(self, ranks: Iterable[int]) -> None:
        """Read how many gradients each of `ranks` has computed."""
        for rank in ranks:
            if rank != self._rank and rank not in self.dead:
                try:
                    self.gradients[rank] = self._words.read(rank, GRADIENTS)
                except Unreachable:
                    self.dead.add(rank)

    def announce(self, status: int) -> None:
        """Publish this rank's status."""
        self._set(STATUS, status)
        self.status[self._rank] = status

    def speak(self) -> bool:
        """Return True for the first rank that asks: it alone says why the run failed."""
        try:
            return self._words.swap(0, SPOKESMAN, 0, 1)
        except Unreachable:
            return True  # rank 0 is gone: better said twice than not at all

    def stop_after(self, step: int) -> None:
        """Publish which step is the last one."""
        self._set(LAST, step)

    def last_step(self, rank: int) -> int:
        """Read which step `rank` declared the last one; 0 if none yet."""
        return self._words.read(rank, LAST)

    def refresh(self, ranks: Iterable[int]) -> None:
        """Read samples and status of `ranks`."""
        for rank in ranks:
            if rank != self._rank:
                try:
                    self.samples[rank] = self._words.read(rank, SAMPLES)
                    self.status[rank] = self._words.read(rank, STATUS)
                except Unreachable:
                    self.dead.add(rank)

    def beat(self, words: Words) -> None:
        """Show that this rank lives."""
        self._set(BEAT, self._mine[BEAT] + 1, words)

    def watch(self, ranks: Iterable[int], words: Words, avoided: Container[int] = ()) -> None:
        """Read notices and heartbeats; a rank that is silent for too long is put in `dead`.

        Those of `avoided` are not read, and count as silent.
        """
        now = time.monotonic()
        # A time in which this rank itself did not run says nothing about the others.
        waited = min(now - self._watched, _LONGEST)
        self._watched = now
        for rank in ranks:
            if rank == self._rank or rank in self.dead:
                continue
            try:
                beat = self._beats[rank] if rank in avoided else self._read(rank, words)
            except Unreachable:
                self.dead.add(rank)
                continue
            self._quiet[rank] = 0.0 if beat != self._beats[rank] else self._quiet[rank] + waited
            self._beats[rank] = beat
            if self._quiet[rank] > self._silence and self.status[rank] in (RUNNING, FINISHED):
                self.dead.add(rank)

    def _read(self, rank: int, words: Words) -> int:
        """Read the notices of `rank`; return its heartbeat."""
        beat, status = words.read(rank, BEAT), words.read(rank, STATUS)
        self.gradients[rank] = words.read(rank, GRADIENTS)  # before a status says: all
        self.samples[rank], self.status[rank] = words.read(rank, SAMPLES), status
        return beat

    def missed(self, rank: int, seconds: float) -> None:
        """Count a time in which `rank` did not answer, and no other was asked, as its silence."""
        self._quiet[rank] += seconds
        self._watched = time.monotonic()

    def gone(self, rank: int) -> bool:
        """Return whether nothing sent to `rank` will arrive any more."""
        return rank in self.dead or self.status[rank] == LEFT

    @property
    def total(self) -> int:
        """Samples that all ranks have processed, as far as this rank has seen."""
        return sum(self.samples)
