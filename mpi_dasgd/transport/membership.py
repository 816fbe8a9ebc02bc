"""Membership: what ranks tell each other about themselves, and the detection of failed ranks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Container, Iterable, Iterator, MutableSequence
from typing import Protocol

from mpi_dasgd.errors import PeerFailed, Unreachable
from mpi_dasgd.transport.activity import Activity, ReportedActivity
from mpi_dasgd.transport.control_words import (
    ACTIVITY,
    CALL,
    CHECKSUM,
    ERROR_REPORTER,
    GRADIENTS,
    HEARTBEAT,
    LAST_STEP,
    SAMPLES,
    SHARDS,
    STATUS,
    Words,
)

__all__ = ["DEPARTED", "FAILED", "FINISHED", "RUNNING", "Membership", "StepWords"]

RUNNING, FINISHED, FAILED, DEPARTED = range(4)
"""Status of a rank: training; trained, but still absorbing deltas; failed; gone for good."""

# Word of the status: the status, then exit code and cause (a rank) of a rank that has failed.
_STATUS_BITS, _EXIT_CODE_BITS = 8, 8
_MAX_COUNTED_SILENCE = 0.2  # seconds of silence that count between two polls


class StepWords(Protocol):
    """Several words of a step by one call; `transport/rma/step_words.py` has it in native code."""

    gradients: MutableSequence[int]
    samples: MutableSequence[int]
    news: MutableSequence[int]
    counts_others: bool

    @property
    def status(self) -> list[int]: ...

    def begin_step(self, gradients: int, /) -> int: ...

    def end_step(self, samples: int, /) -> int: ...

    def read_peers(self) -> int: ...


class Membership:
    """This rank's status words, and the newest known values of the other ranks' words.

    Args:
        words: control words of all ranks. `send_heartbeat` and `detect_failures`, which run in the
            progress thread, are given their own.
        rank: this rank.
        size: number of ranks.
        heartbeat_timeout: seconds without a heartbeat after which a rank counts as dead.

    Attributes:
        samples: samples processed, per rank.
        gradients: gradients computed, per rank: its newest step of its own.
        activities: what each rank does at present, if others may wait for long meanwhile.
        status: status, per rank.
        calls: collective call that each rank is in; `training/collective_calls.py` has the values.
        checksums: newest checksum of each rank's model; `training/replica_check.py` has the values.
        exit_codes: exit code of a rank that has failed, per rank; 0 if there is none.
        causes: rank by whose failure a rank has failed, per rank; itself if by its own.
        news: whether a step has seen that the status of a rank is another one than known, (1,).
        dead: ranks that were silent too long or cannot be reached.
    """

    def __init__(self, words: Words, rank: int, size: int, heartbeat_timeout: float) -> None:
        self._words = words
        self._rank = rank
        self._heartbeat_timeout = heartbeat_timeout
        self._own_values = dict.fromkeys(
            (
                *(HEARTBEAT, SAMPLES, STATUS, LAST_STEP),
                *(GRADIENTS, ACTIVITY, SHARDS, CALL, CHECKSUM),
            ),
            0,
        )
        self.samples: MutableSequence[int] = [0] * size
        self.gradients: MutableSequence[int] = [0] * size
        self.news: MutableSequence[int] = [0]
        self._step_words: StepWords | None = None
        self.status = [RUNNING] * size
        self.activities = [ReportedActivity()] * size
        self.calls = [0] * size
        self.checksums = [0] * size
        self.exit_codes = [0] * size
        self.causes = list(range(size))
        self.dead: set[int] = set()
        self._locks = [threading.Lock() for _ in range(size)]
        self._heartbeats = [-1] * size
        self._silent_seconds = [0.0] * size
        self._last_check = time.monotonic()

    def _set(self, index: int, value: int, words: Words | None = None) -> None:
        if self._step_words is not None and index in (GRADIENTS, SAMPLES):
            self._own_values[index] = self._words.read(self._rank, index)  # a step may have set it
        if value != self._own_values[index]:
            (words or self._words).swap(self._rank, index, self._own_values[index], value)
            self._own_values[index] = value

    def use(self, step_words: StepWords) -> None:
        """Write and read the words of a step by native calls, from before the first step on."""
        self._step_words = step_words
        self.gradients, self.samples = step_words.gradients, step_words.samples
        self.news = step_words.news

    @property
    def reads_in_steps(self) -> bool:
        """Whether a step reads samples and status of the other ranks, so that `news` counts."""
        return self._step_words is not None and self._step_words.counts_others

    def begin_step(self, gradients: int, ranks: Iterable[int]) -> int:
        """Publish how many gradients this rank has computed; return those of all ranks.

        Args:
            gradients: the number.
            ranks: ranks whose numbers are read, beside this one; of others it is as known.
        """
        if self._step_words is None:
            self.report_gradients(gradients)
            self.refresh_gradients(ranks)
            return sum(self.gradients)
        return self._step_words.begin_step(gradients)

    def end_step(self, samples: int, ranks: Iterable[int]) -> int:
        """Publish how many samples this rank has processed; return the gradients of all ranks.

        Args:
            samples: the number.
            ranks: as for `begin_step`.
        """
        if self._step_words is None:
            self.report_samples(samples)
            self.refresh_gradients(ranks)
            return sum(self.gradients)
        return self._step_words.end_step(samples)

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

    def publish_status(self, status: int, exit_code: int = 0, cause: int | None = None) -> None:
        """Publish this rank's status.

        Args:
            status: one of the four.
            exit_code: of a rank that has failed: with which exit code its process ends, 0 to 255.
            cause: of a rank that has failed: the rank by whose failure; None: by its own.
        """
        cause = self._rank if cause is None else cause
        word = (cause << _EXIT_CODE_BITS | exit_code) << _STATUS_BITS | status
        self._set(STATUS, word if status == FAILED else status)
        self._store_status(self._rank, self._own_values[STATUS])

    def _store_status(self, rank: int, word: int) -> None:
        self.exit_codes[rank] = word >> _STATUS_BITS & (1 << _EXIT_CODE_BITS) - 1
        self.causes[rank] = word >> _STATUS_BITS + _EXIT_CODE_BITS
        self.status[rank] = word & (1 << _STATUS_BITS) - 1

    def check_failures(self) -> None:
        """Raise if a rank is known to have failed: this one, or else the first one.

        Raises:
            PeerFailed: one has; it names the rank that is the cause.
        """
        if FAILED in self.status:
            has_failed = self.status[self._rank] == FAILED
            rank = self._rank if has_failed else self.status.index(FAILED)
            raise PeerFailed(self.causes[rank], self.exit_codes[rank])

    def report_activity(self, activity: Activity) -> None:
        """Publish what this rank does, after the gradients that it has reported."""
        reported = ReportedActivity(activity, self.gradients[self._rank])
        self._set(ACTIVITY, reported.pack())
        self.activities[self._rank] = reported

    def claim_error_report(self) -> bool:
        """Return True for the first rank that calls: it alone reports why the run failed."""
        try:
            return self._words.swap(0, ERROR_REPORTER, 0, 1)
        except Unreachable:
            return True  # rank 0 is gone: better reported twice than not at all

    def publish_call(self, call: int) -> None:
        """Publish which collective call this rank is in."""
        self._set(CALL, call)
        self.calls[self._rank] = call

    def publish_checksum(self, checksum: int) -> None:
        """Publish a checksum of this rank's model, an integer of up to 63 bits."""
        self._set(CHECKSUM, checksum)
        self.checksums[self._rank] = checksum

    def publish_last_step(self, step: int) -> None:
        """Publish which step is the last one."""
        self._set(LAST_STEP, step)

    def read_last_step(self, rank: int) -> int:
        """Return the step that `rank` has declared the last one; 0 if none yet."""
        return self._words.read(rank, LAST_STEP)

    def publish_shards(self, digest: int) -> bool:
        """Publish how this rank shares data, unless it has done so; return whether it had not."""
        is_first = not self._own_values[SHARDS]
        if is_first:
            self._set(SHARDS, digest)
        return is_first

    def read_shards(self, rank: int) -> int:
        """Return how `rank` shares data; 0 if it has not said so yet."""
        return self._words.read(rank, SHARDS)

    def refresh(self, ranks: Iterable[int]) -> None:
        """Read samples and status of `ranks`."""
        if self._step_words is not None:
            if self._step_words.read_peers():
                for rank, word in enumerate(self._step_words.status):
                    if rank != self._rank:
                        self._store_status(rank, word)
            return
        for rank in ranks:
            if rank != self._rank:
                try:
                    status = self._words.read(rank, STATUS)  # first: the samples are final then
                    self.samples[rank] = self._words.read(rank, SAMPLES)
                    self._store_status(rank, status)
                except Unreachable:
                    self.dead.add(rank)

    def refresh_progress(self, ranks: Iterable[int]) -> None:
        """Read activity, collective call, gradients and samples of `ranks`."""
        for rank in ranks:
            if rank != self._rank and rank not in self.dead:
                with self.mark_dead_on_failure(rank):
                    self._read_progress(rank, self._words)

    def _read_progress(self, rank: int, words: Words) -> None:
        # Compute and progress thread both read: neither may store what the other knows better.
        with self._locks[rank]:
            self._read_and_store_progress(rank, words)

    def _read_and_store_progress(self, rank: int, words: Words) -> None:
        # Read before the gradients and stored after: once a rank has left they are final, or for
        # the moment, while it is in a call.
        activity = ReportedActivity.unpack(words.read(rank, ACTIVITY))
        call = words.read(rank, CALL)
        self.gradients[rank] = words.read(rank, GRADIENTS)
        self.samples[rank] = words.read(rank, SAMPLES)
        self.checksums[rank] = words.read(rank, CHECKSUM)
        self.activities[rank], self.calls[rank] = activity, call

    def send_heartbeat(self, words: Words) -> None:
        """Count this rank's heartbeat up."""
        self._set(HEARTBEAT, self._own_values[HEARTBEAT] + 1, words)

    def detect_failures(
        self, ranks: Iterable[int], words: Words, quarantined: Container[int] = ()
    ) -> None:
        """Read status and heartbeat of `ranks`, and add those that are silent too long to `dead`.

        Args:
            ranks: ranks to poll; this rank and dead ones are left out.
            words: control words, as the calling thread may use them.
            quarantined: ranks that are not read, and count as silent.
        """
        now = time.monotonic()
        # Time in which this rank itself did not run says nothing about the others.
        elapsed = min(now - self._last_check, _MAX_COUNTED_SILENCE)
        self._last_check = now
        for rank in ranks:
            if rank == self._rank or rank in self.dead:
                continue
            try:
                heartbeat = (
                    self._heartbeats[rank] if rank in quarantined else self._poll(rank, words)
                )
            except Unreachable:
                self.dead.add(rank)
                continue
            self._silent_seconds[rank] = (
                0.0 if heartbeat != self._heartbeats[rank] else self._silent_seconds[rank] + elapsed
            )
            self._heartbeats[rank] = heartbeat
            if self._silent_seconds[rank] > self._heartbeat_timeout and self.status[rank] in (
                RUNNING,
                FINISHED,
            ):
                self.dead.add(rank)

    def _poll(self, rank: int, words: Words) -> int:
        """Read the words of `rank`; return its heartbeat."""
        heartbeat, status = words.read(rank, HEARTBEAT), words.read(rank, STATUS)
        # Read after the status and stored before it: with status FINISHED it is final.
        self._read_progress(rank, words)
        self._store_status(rank, status)
        return heartbeat

    def add_silence(self, rank: int, seconds: float) -> None:
        """Add `seconds` to the silence of `rank`.

        The progress thread was blocked on it, and polled no other rank meanwhile.
        """
        self._silent_seconds[rank] += seconds
        self._last_check = time.monotonic()

    @contextlib.contextmanager
    def mark_dead_on_failure(self, rank: int) -> Iterator[None]:
        """Mark `rank` as dead if the calls to it in the body find it unreachable."""
        try:
            yield
        except Unreachable:
            self.dead.add(rank)

    def is_unreachable(self, rank: int) -> bool:
        """Return whether nothing that is sent to `rank` arrives any more."""
        return rank in self.dead or self.status[rank] == DEPARTED

    @property
    def total_samples(self) -> int:
        """Samples that all ranks have processed, as far as this rank has seen."""
        return sum(self.samples)
