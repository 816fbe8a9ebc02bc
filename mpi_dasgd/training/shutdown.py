"""End of the exchanges of a run: after it no delta is in flight, and no rank owes another one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.training.waiter import Waiter
from mpi_dasgd.transport.membership import FINISHED, RUNNING, Membership

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["drain"]

_ABSORB_SECONDS = 0.001  # seconds between two checks of the inbox


def drain(endpoint: RmaEndpoint, algorithm: Algorithm, waiter: Waiter, local_step: int) -> None:
    """Stop exchanging, and absorb what other ranks still send, until all of them have stopped.

    Args:
        endpoint: transport of this rank.
        algorithm: algorithm of this rank, which starts no exchange any more.
        waiter: waits for the other ranks; a rank that has died is not waited for.
        local_step: number of steps that this rank has made.

    Raises:
        PeerLost: a rank has failed, or one that the algorithm cannot do without is gone.
    """

    def all_sent() -> bool:
        if endpoint.is_flushed():
            return True
        algorithm.absorb(local_step)  # ranks may wait for free slots of each other's inboxes
        return False

    membership = endpoint.membership
    for request in algorithm.finalize():
        waiter.wait(request.test)
    waiter.wait(all_sent)
    membership.publish_status(FINISHED)
    while not (_all_stopped(membership) and algorithm.is_drained):
        algorithm.absorb(local_step)
        time.sleep(_ABSORB_SECONDS)
        waiter.check_peers()
    algorithm.absorb(local_step)


def _all_stopped(membership: Membership) -> bool:
    return all(
        status != RUNNING or rank in membership.dead
        for rank, status in enumerate(membership.status)
    )
