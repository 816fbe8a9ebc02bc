"""Budget of a run: how much of it all ranks have used, and when training ends."""

from __future__ import annotations

import time

from mpi_dasgd.algorithms.build import RunParts
from mpi_dasgd.transport.membership import RUNNING, Membership

__all__ = ["Budget"]


class Budget:
    """Budget of a run, in samples of all ranks or in wall time.

    Args:
        parts: parts of the run.
        membership: samples that the other ranks have reported.
        rank: this rank.

    Attributes:
        samples: samples that this rank has processed.
        origin: time on ``time.monotonic()`` at which `elapsed` was 0, seconds.
    """

    def __init__(self, parts: RunParts, membership: Membership, rank: int) -> None:
        self.samples = 0
        self._sample_limit = parts.config.budget.samples
        self._seconds_limit = parts.config.budget.seconds
        self._local_steps = parts.config.algorithm.local_steps
        self._lockstep = parts.lockstep
        # Rank 0 declares the last step: clocks would stop ranks at different ones.
        self._stops_by_declaration = parts.lockstep and self._seconds_limit is not None
        self._max_steps_ahead = parts.max_steps_ahead
        self._membership = membership
        self._rank, self._size = rank, parts.topology.size
        self._known_last_step = 0
        self._elapsed_before = 0.0
        self._newest_progress: float | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count `elapsed` from now on, added to that of an earlier part of the run."""
        self.origin = time.monotonic() - self._elapsed_before

    def resume(self, samples: int, elapsed: float) -> None:
        """Continue from the samples of this rank and the seconds of an earlier part of the run.

        `restart_clock` then sets the clock.
        """
        self.samples = samples
        self._elapsed_before = elapsed
        self._newest_progress = None

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self.origin

    @property
    def total_samples(self) -> int:
        """Samples that all ranks have processed, as far as this rank has seen.

        In lockstep a rank takes those of the others for as many as its own while it trains, so that
        all are at the same progress: each makes its share of the budget, then leaves.
        """
        if self._lockstep and self._is_running:
            return self.samples * self._size
        return sum(self._membership.samples)

    @property
    def progress(self) -> float:
        """Fraction of the budget that is used, in [0, 1]; 0 without a budget."""
        if self._sample_limit is not None:
            # Asked several times a step: in lockstep only does it take more than one look.
            total = self.total_samples if self._lockstep else sum(self._membership.samples)
            return min(1.0, total / self._sample_limit)
        if self._seconds_limit is not None:
            return min(1.0, self.elapsed / self._seconds_limit)
        return 0.0

    def is_spent(self, local_step: int) -> bool:
        """Return whether training ends after `local_step` steps of this rank."""
        if self._stops_by_declaration and self._is_running:
            self._known_last_step = self._membership.read_last_step(0)
        return self.was_spent(local_step)

    def was_spent(self, local_step: int) -> bool:
        """Return the same without reading anything new from other ranks."""
        if self._stops_by_declaration:
            return 0 < self._known_last_step <= local_step
        self._newest_progress = progress = self.progress
        return progress >= 1.0

    def progress_of_step(self) -> float:
        """Return the progress that the schedule takes for the step that begins.

        Of a budget in samples, asynchronous ranks take that of the end of their last step: what
        others have reported since then is counted one step later, and nothing is asked twice.
        """
        if self._newest_progress is None or self._lockstep or self._sample_limit is None:
            return self.progress
        return self._newest_progress

    @property
    def _is_running(self) -> bool:
        return self._membership.status[self._rank] == RUNNING

    def declare_last_step(self, local_step: int) -> None:
        """Publish once, on rank 0 in its step `local_step`, where ranks in lockstep stop.

        It happens as soon as the time is up, and names a step beyond all that any rank can have
        started by then. Without such a budget, and on other ranks, nothing happens.
        """
        if not self._stops_by_declaration or self._rank != 0 or self.progress < 1.0:
            return
        if self._membership.read_last_step(0) == 0:
            next_exchange = -(-local_step // self._local_steps) * self._local_steps
            self._membership.publish_last_step(next_exchange + self._max_steps_ahead)
