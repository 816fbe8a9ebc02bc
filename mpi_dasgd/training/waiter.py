"""Waiting for other ranks without keeping the core, and noticing when one of them is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.errors import PeerLost
from mpi_dasgd.training.collective_calls import refuse_mismatch
from mpi_dasgd.training.stall import StallWatch

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["PEER_CHECK_SECONDS", "Waiter"]

PEER_CHECK_SECONDS = 0.005  # seconds between two reads of the other ranks' status
_STEP_CHECK_SECONDS = 0.02  # the same between steps, where each step sees that one has changed
_LONG_WAIT_SECONDS = 1.0  # from when on it is watched whether the others make progress


class Waiter:
    """Waits for other ranks, and checks that those that are needed live.

    Args:
        endpoint: transport of this rank.
        algorithm: algorithm of this rank.
        stall_timeout: seconds without progress of any rank after which a wait ends.

    Attributes:
        wait_seconds: time spent in `wait` so far.
    """

    def __init__(
        self, endpoint: RmaEndpoint, algorithm: Algorithm, stall_timeout: float = 600.0
    ) -> None:
        self.wait_seconds = 0.0
        self._endpoint = endpoint
        self._algorithm = algorithm
        self._stall = StallWatch(endpoint, stall_timeout)
        self._last_check = time.monotonic()
        membership = endpoint.membership
        self._news = membership.news
        self._interval = _STEP_CHECK_SECONDS if membership.reads_in_steps else PEER_CHECK_SECONDS

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Call `is_done` until it returns True; yield the core between calls, up to 0.5 ms.

        Raises:
            PeerLost: see `poll_until`.
        """
        started = time.perf_counter()
        self.poll_until(is_done)
        self.wait_seconds += time.perf_counter() - started

    def poll_until(self, is_done: Callable[[], bool]) -> None:
        """Wait as `wait` does, without counting the time.

        What `is_done` gives away reaches the other ranks; see `Endpoint.flush`.

        Raises:
            PeerLost: see `check_peers`; or no other rank makes progress for too long.
        """
        started = time.perf_counter()
        pause, is_long = 0.0, False
        try:
            while not is_done():
                self._endpoint.flush()  # what others wait for, and what `is_done` gave away
                time.sleep(pause)
                waited = time.perf_counter() - started
                pause = 0.0 if waited < 1e-4 else min(5e-4, waited / 8)
                if waited > PEER_CHECK_SECONDS:
                    self.check_peers()
                if waited > _LONG_WAIT_SECONDS:
                    if not is_long:
                        is_long = True
                        self._stall.begin()
                    self._stall.look()
        finally:
            if is_long:
                self._stall.end()
        self._endpoint.flush()

    def poll(self, is_done: Callable[[], object]) -> None:
        """Call `is_done` until it returns something true, but no longer than some milliseconds."""
        started = time.perf_counter()
        pause = 0.0
        while not is_done() and time.perf_counter() - started < PEER_CHECK_SECONDS:
            self._endpoint.flush()
            time.sleep(pause)
            pause = min(2e-4, pause + 1e-5)

    def check_peers_if_due(self) -> None:
        """Call `check_peers` after a step, if the last call is long ago or a status has changed."""
        if self._news[0] or time.monotonic() - self._last_check > self._interval:
            self.check_peers()

    def check_peers(self) -> None:
        """Read the status of the other ranks.

        Raises:
            PeerFailed: a rank has failed.
            PeerLost: a rank that the algorithm cannot do without is gone.
            UserError: a rank waits in a collective call to which another will not come.
        """
        self._endpoint.refresh_membership()
        self._last_check = time.monotonic()
        membership = self._endpoint.membership
        membership.check_failures()
        if membership.dead and (lost := membership.dead & self._algorithm.required_ranks):
            raise PeerLost(f"rank {min(lost)} is gone, and {self._algorithm.name} needs it")
        refuse_mismatch(self._endpoint)
