"""End of the exchanges of a run: after it no delta is in flight, and no rank owes another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.algorithms.communication import wait
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.errors import Diverged
from mpi_dasgd.training.join import Shadow
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from mpi_dasgd.training.waiter import Waiter
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.membership import FAILED, FINISHED, RUNNING, Membership

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["adopt_model", "drain", "follow", "leave", "workers_have_stopped"]


def leave(
    endpoint: RmaEndpoint,
    algorithm: Algorithm,
    waiter: Waiter,
    shadow: Shadow,
    local: TorchLocalOptimizer,
    take_part: Callable[[], None] = lambda: None,
) -> None:
    """End the exchanges of this rank: follow those that still train, then drain.

    Args:
        endpoint: transport of this rank.
        algorithm: algorithm of this rank, which starts no exchange any more.
        waiter: waits for the other ranks; a rank that has died is not waited for.
        shadow: takes part in the steps of others.
        local: local optimizer of this rank.
        take_part: takes part in a collective call that ranks that still train make.

    Raises:
        Diverged: the model is not finite, and others would average with it.
        PeerLost: a rank has failed, or one that the algorithm cannot do without is gone, or none
            makes progress.
    """
    try:
        local.require_finite_updates()
        if shadow.in_lockstep:
            local.require_finite_model()
    except Diverged:
        endpoint.membership.publish_status(FAILED)
        raise

    def meanwhile() -> None:
        take_part()
        shadow.attend_others()

    try:
        with shadow.attention_to_others(waiter.poll_until):
            if shadow.in_lockstep:
                endpoint.membership.report_activity(Activity.SHADOWING)
                follow(waiter, shadow, Activity.SHADOWING, take_part)
                adopt_model(endpoint, algorithm, waiter, local.device)
            endpoint.membership.report_activity(Activity.FINISHING)
            drain(endpoint, algorithm, waiter, local.local_step, meanwhile)
    finally:
        shadow.close()


def follow(
    waiter: Waiter,
    shadow: Shadow,
    until: Activity | Callable[[], bool],
    take_part: Callable[[], None] = lambda: None,
) -> None:
    """Take part in the steps of others until all ranks are at `until`; see `Shadow.poll`.

    All ranks have made the same number of steps then.

    Raises:
        PeerLost: see `leave`.
    """

    def is_done() -> bool:
        if shadow.poll(until):
            return True
        take_part()
        shadow.attend_others()
        return False

    waiter.poll_until(is_done)


def adopt_model(
    endpoint: RmaEndpoint, algorithm: Algorithm, waiter: Waiter, device: Device = HOST
) -> None:
    """Copy the model of a rank that made most steps to all, where all have the same one anyway.

    Nothing happens if all have made the same number of steps. Call it after `follow`, on all ranks.

    Args:
        endpoint, algorithm, waiter: see `leave`.
        device: where the model is.

    Raises:
        PeerLost: see `leave`.
    """
    last_steps = [reported.step for reported in endpoint.membership.activities]
    if not algorithm.capabilities.one_model or len(set(last_steps)) == 1:
        return
    source = last_steps.index(max(last_steps))
    # As integers: their sum with zeros has the same bits, also those of NaN and -0.
    bits = device.to_host(algorithm.x).view(np.uint8).view(np.int32).copy()
    if endpoint.rank != source:
        bits[:] = 0
    for request in wait(endpoint.allreduce(bits)):
        waiter.poll_until(request.test)
    device.assign(algorithm.x, bits.view(algorithm.x.dtype))


def drain(
    endpoint: RmaEndpoint,
    algorithm: Algorithm,
    waiter: Waiter,
    local_step: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Stop exchanging, and absorb what other ranks still send, until all of them have stopped.

    Args:
        endpoint, algorithm, waiter: see `leave`.
        local_step: number of steps that this rank has made.
        meanwhile: called while this rank waits for others to stop.

    Raises:
        PeerLost: see `leave`.
    """
    membership = endpoint.membership

    def all_sent() -> bool:
        if endpoint.is_flushed():
            return True
        algorithm.absorb(local_step)  # ranks may wait for free slots of each other's inboxes
        return False

    def all_stopped() -> bool:
        if _have_stopped(membership, range(endpoint.size)) and algorithm.is_drained:
            return True
        algorithm.absorb(local_step)
        meanwhile()
        waiter.check_peers()
        return False

    for request in algorithm.finalize():
        waiter.poll_until(request.test)
    waiter.poll_until(all_sent)
    membership.publish_status(FINISHED)
    waiter.poll_until(all_stopped)
    algorithm.absorb(local_step)
    endpoint.flush()


def workers_have_stopped(endpoint: RmaEndpoint, algorithm: Algorithm) -> bool:
    """Return whether all ranks that compute gradients have finished, or died."""
    workers = algorithm.workers(endpoint.size, algorithm.settings)
    return _have_stopped(endpoint.membership, workers)


def _have_stopped(membership: Membership, ranks: Iterable[int]) -> bool:
    return all(membership.status[rank] != RUNNING or rank in membership.dead for rank in ranks)
