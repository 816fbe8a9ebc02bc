"""Sums over all ranks: polled until all have come, then at the library's full speed, and watched over."""

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

_TICKS = 20  # looks at a sum in `silence` seconds


class WatchedAllreduce:
    """Makes sums over all ranks, and ends the process if a rank dies inside one.

    The library then waits for ever, in a call that nothing interrupts, and burns a core.
    (`Iallreduce`, polled, could be left; but small ones take 3 times as long or more.)

    Args:
        comm: communicator of all ranks.
        heartbeat_timeout: seconds in a sum after which this rank ends, if others are lost.
        lost: returns which are; called by a thread of its own.
    """

    def __init__(
        self, comm: MPI.Intracomm, heartbeat_timeout: float, lost: Callable[[], Collection[int]]
    ) -> None:
        self._comm = comm
        self._heartbeat_timeout = heartbeat_timeout
        self._lost = lost
        self._count = 0  # of sums begun and ended: odd inside of one
        self._watch: threading.Thread | None = None

    def begin(self, array: np.ndarray) -> AllreduceRequest:
        """Return the pending sum of `array`, in place."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._watchdog, name="sums", daemon=True)
            self._watch.start()
        with _peer_loss_on_failure():
            return AllreduceRequest(self._comm.Ibarrier(), lambda: self._add(array))

    def _add(self, array: np.ndarray) -> None:
        self._count += 1
        with _peer_loss_on_failure():
            self._comm.Allreduce(MPI.IN_PLACE, array)
        self._count += 1

    def _watchdog(self) -> None:
        """Count looks at the same sum: time in which this process itself did not run is none."""
        seen, looks = 0, 0
        while True:
            time.sleep(self._heartbeat_timeout / _TICKS)
            looks = looks + 1 if self._count == seen else 0
            seen = self._count
            if seen % 2 and looks > _TICKS and (lost := sorted(self._lost())):
                _log.error(
                    "rank %d: ranks %s are gone, inside a sum over all ranks", self._comm.rank, lost
                )
                sys.stdout.flush()
                os._exit(PeerLost.exit_code)


class AllreduceRequest:
    """A sum that starts when all ranks have come.

    Waiting for them is a polled barrier, so that a rank that waits neither burns a core nor misses
    the news that another has failed.
    """

    def __init__(self, barrier: MPI.Request, add: Callable[[], None]) -> None:
        self._barrier = barrier
        self._add = add
        self._complete = False

    def test(self) -> bool:
        """Return whether the sum is there."""
        if not self._complete:
            with _peer_loss_on_failure():
                arrived = self._barrier.Test()
            if arrived:
                self._add()
                self._complete = True
        return self._complete


@contextlib.contextmanager
def _peer_loss_on_failure() -> Iterator[None]:
    """A call to all ranks, which fails if one of them is gone."""
    try:
        yield
    except MPI.Exception as error:
        raise PeerLost(f"the other ranks cannot be reached: {error}") from error
