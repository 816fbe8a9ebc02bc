"""Board: what every rank tells all others about itself: heartbeats, samples processed, status."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable

from mpi_dasgd.errors import Unreachable
from mpi_dasgd.transport.control_words import (
    ERROR_REPORTER,
    GRADIENTS,
    HEARTBEAT,
    LAST_STEP,
    SAMPLES,
    STATUS,
    Words,
)

__all__ = ["DEPARTED", "FAILED", "FINISHED", "RUNNING", "Membership"]

RUNNING, FINISHED, FAILED, DEPARTED = range(4)
"""Status: training, through with training but still absorbing, failed, gone for good."""

_MAX_COUNTED_SILENCE = 0.2  # seconds of silence that count between two looks


class Membership:
    """This rank's notices, and the newest that it has seen of the others.

    Args:
        words: control words of all ranks. `beat` and `watch` may use another view than `words`,
            as they run in the courier's thread.
        rank, size: this rank, and how many there are.
        heartbeat_timeout: seconds without a heartbeat after which a rank counts as dead.
    """

    def __init__(self, words: Words, rank: int, size: int, heartbeat_timeout: float) -> None:
        self._words = words
        self._rank = rank
        self._heartbeat_timeout = heartbeat_timeout
        self._own_values = {HEARTBEAT: 0, SAMPLES: 0, STATUS: RUNNING, LAST_STEP: 0, GRADIENTS: 0}
        self.samples = [0] * size
        self.gradients = [0] * size
        self.status = [RUNNING] * size
        self.dead: set[int] = set()
        self._heartbeats = [-1] * size
        self._silent_seconds = [0.0] * size
        self._last_check = time.monotonic()

    def _set(self, index: int, value: int, words: Words | None = None) -> None:
        if value != self._own_values[index]:
            (words or self._words).swap(self._rank, index, self._own_values[index], value)
            self._own_values[index] = value

    def report_samples(self, samples: int) -> None:
        """Publish how many samples this rank has processed."""
        self._set(SAMPLES, samples)
        self.samples[self._rank] = samples

    def report_gradients(self, gradients: int) -> None:
        """Publish how many gradients this rank has computed."""
        self._set(GRADIENTS, gradients)
        self.gradients[self._rank] = gradients

    def refresh_gradients(self, ranks: Iterable[int]) -> None:
        """Read how many gradients each of `ranks` has computed."""
        for rank in ranks:
            if rank != self._rank and rank not in self.dead:
                try:
                    self.gradients[rank] = self._words.read(rank, GRADIENTS)
                except Unreachable:
                    self.dead.add(rank)

    def publish_status(self, status: int) -> None:
        """Publish this rank's status."""
        self._set(STATUS, status)
        self.status[self._rank] = status

    def claim_error_report(self) -> bool:
        """Return True for the first rank that asks: it alone says why the run failed."""
        try:
            return self._words.swap(0, ERROR_REPORTER, 0, 1)
        except Unreachable:
            return True  # rank 0 is gone: better said twice than not at all

    def publish_last_step(self, step: int) -> None:
        """Publish which step is the last one."""
        self._set(LAST_STEP, step)

    def read_last_step(self, rank: int) -> int:
        """Read which step `rank` declared the last one; 0 if none yet."""
        return self._words.read(rank, LAST_STEP)

    def refresh(self, ranks: Iterable[int]) -> None:
        """Read samples and status of `ranks`."""
        for rank in ranks:
            if rank != self._rank:
                try:
                    self.samples[rank] = self._words.read(rank, SAMPLES)
                    self.status[rank] = self._words.read(rank, STATUS)
                except Unreachable:
                    self.dead.add(rank)

    def send_heartbeat(self, words: Words) -> None:
        """Show that this rank lives."""
        self._set(HEARTBEAT, self._own_values[HEARTBEAT] + 1, words)

    def detect_failures(
        self, ranks: Iterable[int], words: Words, quarantined: Container[int] = ()
    ) -> None:
        """Read notices and heartbeats; a rank that is silent for too long is put in `dead`.

        Those of `quarantined` are not read, and count as silent.
        """
        now = time.monotonic()
        # A time in which this rank itself did not run says nothing about the others.
        waited = min(now - self._last_check, _MAX_COUNTED_SILENCE)
        self._last_check = now
        for rank in ranks:
            if rank == self._rank or rank in self.dead:
                continue
            try:
                beat = self._heartbeats[rank] if rank in quarantined else self._read(rank, words)
            except Unreachable:
                self.dead.add(rank)
                continue
            self._silent_seconds[rank] = (
                0.0 if beat != self._heartbeats[rank] else self._silent_seconds[rank] + waited
            )
            self._heartbeats[rank] = beat
            if self._silent_seconds[rank] > self._heartbeat_timeout and self.status[rank] in (
                RUNNING,
                FINISHED,
            ):
                self.dead.add(rank)

    def _read(self, rank: int, words: Words) -> int:
        """Read the notices of `rank`; return its heartbeat."""
        beat, status = words.read(rank, HEARTBEAT), words.read(rank, STATUS)
        self.gradients[rank] = words.read(rank, GRADIENTS)  # before a status says: all
        self.samples[rank], self.status[rank] = words.read(rank, SAMPLES), status
        return beat

    def add_silence(self, rank: int, seconds: float) -> None:
        """Count a time in which `rank` did not answer, and no other was asked, as its silence."""
        self._silent_seconds[rank] += seconds
        self._last_check = time.monotonic()

    def is_unreachable(self, rank: int) -> bool:
        """Return whether nothing sent to `rank` will arrive any more."""
        return rank in self.dead or self.status[rank] == DEPARTED

    @property
    def total_samples(self) -> int:
        """Samples that all ranks have processed, as far as this rank has seen."""
        return sum(self.samples)
