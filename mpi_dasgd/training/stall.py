"""Stalls: a wait for other ranks is bounded, and says which rank is waited for."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from mpi_dasgd.errors import PeerLost
from mpi_dasgd.transport.activity import Activity

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["StallWatch"]

_log = logging.getLogger("mpi_dasgd")

_LOOK_SECONDS = 0.25  # between two looks at the other ranks
_WARN_SECONDS = 10.0  # without progress of any rank, after which it is reported once


class StallWatch:
    """Watches, while this rank waits for others, whether any of them makes progress.

    A rank that computes, or waits itself, still sends heartbeats. So one that never comes to the
    exchange that others wait for would not be missed otherwise. Progress of any rank will do: what
    this one waits for may depend on several.

    Args:
        endpoint: transport of this rank.
        timeout: seconds without progress after which a wait ends; see `transport.stall_timeout`.
    """

    def __init__(self, endpoint: RmaEndpoint, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._warned_of: tuple[object, ...] = ()
        self._seen: tuple[object, ...] = ()
        self._silent_seconds = 0.0
        self._last_look = 0.0
        self._reports_step = False

    def begin(self) -> None:
        """Begin to watch a wait that has become long."""
        membership = self._endpoint.membership
        own = membership.activities[self._endpoint.rank]
        self._reports_step = own.activity is Activity.OWN_CODE
        if self._reports_step:
            membership.report_activity(Activity.STEP)
        self._seen, self._silent_seconds, self._last_look = (), 0.0, time.monotonic()

    def end(self) -> None:
        """End a watch that has begun."""
        if self._reports_step:
            self._endpoint.membership.report_activity(Activity.OWN_CODE)

    def look(self) -> None:
        """Look at the other ranks, if the last look is a while ago.

        Raises:
            PeerLost: no other rank has made progress for `timeout` seconds.
        """
        now = time.monotonic()
        elapsed = now - self._last_look
        if elapsed < _LOOK_SECONDS:
            return
        self._last_look = now
        self._endpoint.refresh_progress()
        membership = self._endpoint.membership
        seen = (
            *membership.gradients, *membership.samples, *membership.status, *membership.activities
        )  # fmt: skip
        if seen != self._seen:
            self._seen, self._silent_seconds = seen, 0.0
            return
        # Time in which this rank itself did not run says nothing about the others.
        self._silent_seconds += min(elapsed, 2 * _LOOK_SECONDS)
        if self._silent_seconds >= self._timeout:
            raise PeerLost(
                f"rank {self._endpoint.rank} {self._describe(self._endpoint.rank)} and has seen no "
                f"progress for {self._timeout:g} s: {self._culprits()}; if that may take so long, "
                "raise transport.stall_timeout"
            )
        if self._silent_seconds >= _WARN_SECONDS and self._warned_of != seen:
            self._warned_of = seen
            _log.warning(
                "rank %d %s and has seen no progress for %.0f s: %s",
                self._endpoint.rank,
                self._describe(self._endpoint.rank),
                self._silent_seconds,
                self._culprits(),
            )

    def _culprits(self) -> str:
        """Return what is waited for: ranks that do not wait themselves; all others if all do."""
        membership = self._endpoint.membership
        others = [
            rank
            for rank in range(self._endpoint.size)
            if rank != self._endpoint.rank and not membership.is_unreachable(rank)
        ]
        busy = [
            rank for rank in others if membership.activities[rank].activity is Activity.OWN_CODE
        ]
        return ", ".join(f"rank {rank} {self._describe(rank)}" for rank in busy or others)

    def _describe(self, rank: int) -> str:
        membership = self._endpoint.membership
        return membership.activities[rank].describe(membership.gradients[rank])
