"""The end of the windows, which all ranks free together, if all have come to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from mpi4py import MPI

from mpi_dasgd.errors import PeerLost
from mpi_dasgd.transport.membership import DEPARTED, Membership

__all__ = ["await_all", "free"]

_POLL_SECONDS = 0.001  # between tests of the last barrier


class Closable(Protocol):
    """Memory of MPI whose end is collective."""

    def close(self) -> None:
        """Free it."""


def await_all(
    comm: MPI.Intracomm,
    membership: Membership,
    refresh: Callable[[], None],
    heartbeat_timeout: float,
) -> bool:
    """Wait until all ranks come or one is dead; return False if others left without this rank.

    Args:
        comm: communicator of all ranks.
        membership: what this rank knows of the others.
        refresh: brings `membership` up to date.
        heartbeat_timeout: seconds to wait for ranks that have left.

    Raises:
        PeerFailed: a rank has failed.
        PeerLost: the other ranks cannot be reached.
    """
    seconds_alone = 0.0
    try:
        barrier = comm.Ibarrier()
        while not (barrier.Test() or membership.dead or seconds_alone > heartbeat_timeout):
            time.sleep(_POLL_SECONDS)
            refresh()
            membership.check_failures()
            if DEPARTED in membership.status:
                seconds_alone += _POLL_SECONDS
    except MPI.Exception as error:
        raise PeerLost(f"the other ranks cannot be reached: {error}") from error
    return seconds_alone <= heartbeat_timeout


def free(*windows: Closable, timeout: float) -> None:
    """Free windows, in a thread: there MPI waits for all ranks, also for one that has died.

    Args:
        windows: what to free, in this order.
        timeout: seconds to wait for the other ranks.

    Raises:
        PeerLost: MPI waits for longer than that.
    """
    failures: list[BaseException] = []

    def close() -> None:
        try:
            for window in windows:
                window.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=close, name="mpi_dasgd: end of windows", daemon=True)
    thread.start()
    thread.join(timeout)
    if failures and not isinstance(failures[0], MPI.Exception):
        raise failures[0]
    if thread.is_alive() or failures:
        reason = failures[0] if failures else f"no end in {timeout:g} s"
        raise PeerLost(f"a rank has ended inside close(): windows cannot be freed ({reason})")
