"""Allreduce with a watchdog: polled until all ranks come, then at the MPI library's full speed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator

import numpy as np
from mpi4py import MPI

from mpi_dasgd.errors import PeerLost

__all__ = ["AllreduceRequest", "WatchedAllreduce"]

_log = logging.getLogger("mpi_dasgd")

_POLLS = 20  # of the watchdog within the heartbeat timeout


class WatchedAllreduce:
    """Sums over all ranks; ends the process if a rank dies inside one.

    The MPI library would then wait forever, in a call that nothing interrupts, and burn a core.
    (A polled `Iallreduce` could be abandoned, but takes 3 times as long or more if it is small.)

    Args:
        comm: communicator of all ranks.
        heartbeat_timeout: seconds in an allreduce after which this rank ends if others are lost.
        lost_ranks: returns the ranks that are lost; called by the watchdog thread.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        heartbeat_timeout: float,
        lost_ranks: Callable[[], Collection[int]],
    ) -> None:
        self._comm = comm
        self._heartbeat_timeout = heartbeat_timeout
        self._lost_ranks = lost_ranks
        self._boundaries = 0  # allreduces started plus finished: odd inside of one
        self._watchdog_thread: threading.Thread | None = None

    def begin(self, array: np.ndarray) -> AllreduceRequest:
        """Return the request for the sum of `array` over all ranks, in place.

        Raises:
            PeerLost: the other ranks cannot be reached.
        """
        if self._watchdog_thread is None:
            self._watchdog_thread = threading.Thread(
                target=self._watchdog, name="mpi-dasgd-allreduce-watchdog", daemon=True
            )
            self._watchdog_thread.start()
        with _peer_loss_on_failure():
            return AllreduceRequest(self._comm.Ibarrier(), lambda: self._reduce(array))

    def _reduce(self, array: np.ndarray) -> None:
        self._boundaries += 1
        with _peer_loss_on_failure():
            self._comm.Allreduce(MPI.IN_PLACE, array)
        self._boundaries += 1

    def _watchdog(self) -> None:
        """End the process if one allreduce lasts for too many polls and ranks are lost.

        It counts polls instead of time, so that time in which this process was suspended is not
        counted.
        """
        seen, polls = 0, 0
        while True:
            time.sleep(self._heartbeat_timeout / _POLLS)
            polls = polls + 1 if self._boundaries == seen else 0
            seen = self._boundaries
            if seen % 2 and polls > _POLLS and (lost := sorted(self._lost_ranks())):
                _log.error(
                    "rank %d: ranks %s are gone, inside a sum over all ranks", self._comm.rank, lost
                )
                sys.stdout.flush()
                os._exit(PeerLost.exit_code)


class AllreduceRequest:
    """An allreduce that starts when all ranks have come.

    They are awaited in a polled barrier, so that a waiting rank neither burns a core nor misses the
    news that another has failed.

    Args:
        barrier: request of a barrier of all ranks.
        reduce: does the allreduce; called once, when the barrier is complete.
    """

    def __init__(self, barrier: MPI.Request, reduce: Callable[[], None]) -> None:
        self._barrier = barrier
        self._reduce = reduce
        self._complete = False

    def test(self) -> bool:
        """Return whether the sum is complete.

        Raises:
            PeerLost: the other ranks cannot be reached.
        """
        if not self._complete:
            with _peer_loss_on_failure():
                all_ranks_came = self._barrier.Test()
            if all_ranks_came:
                self._reduce()
                self._complete = True
        return self._complete


@contextlib.contextmanager
def _peer_loss_on_failure() -> Iterator[None]:
    """Raise PeerLost if a call to all ranks in the body fails."""
    try:
        yield
    except MPI.Exception as error:
        raise PeerLost(f"the other ranks cannot be reached: {error}") from error
