"""Work items of a server's workers: contents of their messages, and a queue for those that wait."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from mpi_dasgd.algorithms.communication import send
from mpi_dasgd.transport.endpoint import Endpoint, SendBuffer

__all__ = ["LATEST", "SHUTDOWN", "Outbox", "WorkItem", "send_work_item"]


class WorkItem(NamedTuple):
    """A model version to compute a gradient at: trailer of its message and of the gradient's."""

    start: int
    """Iteration s of the server whose model x_s it is."""
    time_ns: int
    """Time at which the server issued it, by the server's clock, in nanoseconds."""


LATEST = -2
"""`WorkItem.start` of a worker that began with the server's model without a message from it."""

SHUTDOWN = WorkItem(-1, 0)
"""Sent instead of a gradient's work item by a worker that computes no more gradients."""


def send_work_item(
    endpoint: Endpoint,
    send_buffer: SendBuffer,
    item: WorkItem,
    vector: np.ndarray | None,
    step: int,
) -> None:
    """Send a model, a gradient, or the notice that a worker shuts down.

    Args:
        endpoint: transport of this rank.
        send_buffer: buffer for the receiver.
        item: work item that the model or gradient belongs to, or `SHUTDOWN`.
        vector: model or gradient, shape (elements,); None to send none.
        step: local step for the header.
    """
    message = send_buffer.message
    if vector is not None:
        message.payload[:] = vector
    message.trailer[:] = item
    send(endpoint, send_buffer, step)


class Outbox:
    """Sends the server's models: at once if the inbox has a free slot, otherwise later, in order.

    Args:
        endpoint: transport to the workers.
        x: the server's model, shape (elements,).
    """

    def __init__(self, endpoint: Endpoint, x: np.ndarray) -> None:
        self._endpoint = endpoint
        self._x = x
        self._waiting: dict[int, deque[tuple[WorkItem, np.ndarray]]] = {}
        # The newest version and its copy, which all workers that wait for it share.
        self._copy: tuple[int, np.ndarray] | None = None

    def send(self, worker: int, item: WorkItem) -> None:
        """Send x, which is the model of `item`, to `worker`."""
        send_buffer = (
            None if worker in self._waiting else self._endpoint.acquire_send_buffer(worker)
        )
        if send_buffer is not None:
            send_work_item(self._endpoint, send_buffer, item, self._x, item.start)
            return
        if self._copy is None or self._copy[0] != item.start:
            self._copy = item.start, self._x.copy()
        self._waiting.setdefault(worker, deque()).append((item, self._copy[1]))

    def send_waiting(self) -> None:
        """Send the waiting models to workers whose inbox now has a free slot."""
        for worker, queue in list(self._waiting.items()):
            while queue and (send_buffer := self._endpoint.acquire_send_buffer(worker)) is not None:
                item, model = queue.popleft()
                send_work_item(self._endpoint, send_buffer, item, model, item.start)
            if not queue:
                del self._waiting[worker]
        if not self._waiting:
            self._copy = None

    def remove_worker(self, worker: int) -> None:
        """Drop the models that wait for `worker`."""
        self._waiting.pop(worker, None)
