"""Steps of communication that algorithms share: wait for a request, send, publish."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np

from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.codecs import Codec, ExchangeBuffers, Message
from mpi_dasgd.kernels.optimizer import OptimizerStep
from mpi_dasgd.transport.endpoint import Endpoint, Request, SendBuffer

__all__ = ["publish", "publish_vector", "send", "update_of", "wait", "wait_for_send_buffer"]


def wait(request: Request) -> Iterator[Request]:
    """Yield `request` until it is complete."""
    while not request.test():
        yield request


def wait_for_send_buffer(endpoint: Endpoint, rank: int) -> Generator[Request, None, SendBuffer]:
    """Wait until the inbox of `rank` has a free slot; return a send buffer for it."""
    send_buffer: SendBuffer | None = None

    def is_acquired() -> bool:
        nonlocal send_buffer
        send_buffer = send_buffer or endpoint.acquire_send_buffer(rank)
        return send_buffer is not None

    yield from wait(endpoint.wait_until(is_acquired, (rank,)))
    assert send_buffer is not None
    return send_buffer


def send(
    endpoint: Endpoint, send_buffer: SendBuffer, step: int, time_ns: int | None = None
) -> None:
    """Stamp the message in `send_buffer` with `step` and the time, and send it.

    Args:
        endpoint: transport of this rank.
        send_buffer: result of `Endpoint.acquire_send_buffer`, its payload written.
        step: local step for the header.
        time_ns: time for the header, nanoseconds; None for the present.
    """
    now = endpoint.time_ns() if time_ns is None else time_ns
    send_buffer.message.stamp(rank=endpoint.rank, step=step, time_ns=now)
    endpoint.send(send_buffer)


def publish(endpoint: Endpoint, slot: Message | None, step: int) -> None:
    """Stamp and publish what was written to a slot of the own publication.

    Args:
        endpoint: transport of this rank.
        slot: result of `Publication.reserve`; None if no slot was free, which publishes nothing.
        step: local step for the header.
    """
    if slot is not None:
        slot.stamp(rank=endpoint.rank, step=step, time_ns=endpoint.time_ns())
        endpoint.publication.publish()


def publish_vector(
    endpoint: Endpoint,
    codec: Codec,
    vector: np.ndarray,
    step: int,
    update: OptimizerStep | None = None,
) -> Message | None:
    """Encode and publish a vector.

    Args:
        endpoint: transport of this rank.
        codec: codec of this rank.
        vector: shape (elements,), contiguous.
        step: local step for the header.
        update: step of the local optimizer on `vector`, to be made first, in the same pass.

    Returns:
        The slot that holds it, or None if no slot was free and nothing was published.

    Raises:
        Diverged: the vector is not finite after `update`; it was not published.
    """
    slot = endpoint.publication.reserve()
    if update is not None:
        codec.average_pair(vector, ExchangeBuffers(publication=slot, update=update))
        update.on_made()
    elif slot is not None:
        codec.encode(vector, slot)
    publish(endpoint, slot, step)
    return slot


def update_of(local: LocalOptimizer) -> OptimizerStep | None:
    """Return the optimizer's step for a codec to make in its pass, or make it and return None."""
    update = local.fused_update()
    if update is None:
        local.apply()
    return update
