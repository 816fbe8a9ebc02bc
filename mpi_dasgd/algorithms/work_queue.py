"""The jobs of a server's workers: what their messages say, and those that found no room yet."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from mpi_dasgd.transport.endpoint import Endpoint, SendBuffer

__all__ = ["SHUTDOWN", "Outbox", "WorkItem", "send_work_item"]


class WorkItem(NamedTuple):
    """A point to compute a gradient at: the notes of the point's message and of the gradient's."""

    start: int
    """Iteration s of the server whose point x_s it is."""
    time_ns: int
    """When the server gave it away, by the server's clock."""


SHUTDOWN = WorkItem(-1, 0)
"""Instead of a gradient's: the worker computes no more."""


def send_work_item(
    endpoint: Endpoint, posting: SendBuffer, job: WorkItem, vector: np.ndarray | None, step: int
) -> None:
    """Write a point, a gradient or a farewell to `posting`, and send it."""
    message = posting.message
    if vector is not None:
        message.payload[:] = vector
    message.trailer[:] = job
    message.stamp(rank=endpoint.rank, step=step, time_ns=endpoint.time_ns())
    endpoint.send(posting)


class Outbox:
    """Sends the server's points: at once where there is room, else as copies, in order, when there is.

    Args:
        endpoint: the workers.
        x: the server's model.
    """

    def __init__(self, endpoint: Endpoint, x: np.ndarray) -> None:
        self._endpoint = endpoint
        self._x = x
        self._waiting: dict[int, deque[tuple[WorkItem, np.ndarray]]] = {}
        self._copy: tuple[int, np.ndarray] | None = (
            None  # the newest, shared by all who wait for it
        )

    def send(self, worker: int, job: WorkItem) -> None:
        """Send x, which is the point of `job`, to `worker`."""
        posting = None if worker in self._waiting else self._endpoint.acquire_send_buffer(worker)
        if posting is not None:
            send_work_item(self._endpoint, posting, job, self._x, job.start)
            return
        if self._copy is None or self._copy[0] != job.start:
            self._copy = job.start, self._x.copy()
        self._waiting.setdefault(worker, deque()).append((job, self._copy[1]))

    def send_waiting(self) -> None:
        """Send those for which there is room now."""
        for worker, points in list(self._waiting.items()):
            while points and (posting := self._endpoint.acquire_send_buffer(worker)) is not None:
                job, point = points.popleft()
                send_work_item(self._endpoint, posting, job, point, job.start)
            if not points:
                del self._waiting[worker]
        if not self._waiting:
            self._copy = None

    def remove_worker(self, worker: int) -> None:
        """Drop what waits for `worker`."""
        self._waiting.pop(worker, None)
