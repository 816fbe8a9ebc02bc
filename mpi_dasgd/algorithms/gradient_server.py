"""Server half of `asgd` and `minibatch`: applies gradients and issues models (lines 2 and 3)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.records import APPLIED
from mpi_dasgd.algorithms.server import ServerAlgorithm
from mpi_dasgd.algorithms.work_queue import LATEST, SHUTDOWN, Outbox, WorkItem
from mpi_dasgd.staleness.delay_meter import DelayMeter
from mpi_dasgd.staleness.step_rule import delay_rule

__all__ = ["GradientServer"]


class GradientServer(ServerAlgorithm):
    """Base of algorithms whose server applies every gradient by itself.

    Attributes:
        meter: delays of the gradients, on the server.
        threshold: delay above which a gradient counts as delayed, in gradients.
    """

    meter: DelayMeter
    threshold: float
    _item: WorkItem | None
    """Work item of this rank's next gradient."""
    _first: int
    """Iteration of the model that holders began with, on the server."""

    def _begin_serving(self, concurrency: int, holders: Sequence[int]) -> None:
        """Begin to serve, or begin anew when no work item is in flight.

        Args:
            concurrency: number of work items in flight.
            holders: workers that hold the model already.
        """
        workers = self.living
        self._first = self.meter.t
        threshold = self.settings.delay_threshold
        self.threshold = concurrency if threshold is None else threshold
        self._rule = delay_rule(self.settings, concurrency)
        self._idle = deque(workers[concurrency:])  # workers without a model, longest first
        self._unsent = [workers[i % len(workers)] for i in range(len(holders), concurrency)]
        self._outbox = Outbox(self.endpoint, self.x)
        for worker in holders:
            self.meter.start(worker)

    def serve(self, local: LocalOptimizer) -> int:
        """Do lines 2 and 3 for all received gradients; return the number of messages."""
        for worker in self.remove_lost():
            self._remove_worker(worker)
        unsent, self._unsent = self._unsent, []
        for worker in unsent:
            self._send_model(worker)
        messages = self.endpoint.inbox.receive()
        for received in messages:
            item = WorkItem(*received.message.trailer.tolist())
            if item != SHUTDOWN:
                local.gradient[:] = received.message.payload
            if item.start == LATEST:
                item = item._replace(start=self._first)
            self.endpoint.inbox.free(received)
            if item == SHUTDOWN:
                self._remove_worker(received.sender)
            elif self.meter.holds(received.sender, item.start):  # else it was issued to others
                self._apply(local, received.sender, item)
        self._outbox.send_waiting()
        return len(messages)

    def _apply(self, local: LocalOptimizer, client: int, item: WorkItem) -> None:
        iteration = self.meter.t
        lr_scale = self._rule(self.meter.apply(client, item.start))
        if lr_scale > 0:  # otherwise it is dropped, and must not change a momentum either
            local.apply(lr_scale)
        workers = self._choose(client)
        for worker in workers:
            self._send_model(worker)
        self.records.exchange(
            APPLIED,
            iteration,
            partner=client,
            partner_step=item.start,
            sent_ns=item.time_ns,
            nbytes=len(workers) * self.codec.layout.nbytes,
        )

    def _choose(self, client: int | None) -> Sequence[int]:
        """Return the workers that get the newest model (line 3).

        Args:
            client: worker whose gradient was applied; None to issue a lost work item again.
        """
        if self.settings.client_sampling == "uniform":
            return (self.rng.choice(self.living),)
        if client is not None:
            self._idle.append(client)
        return (self._idle.popleft() if self._idle else self.rng.choice(self.living),)

    def _send_model(self, worker: int) -> None:
        """Issue a work item: send x_t to `worker`, now or when its inbox has a free slot."""
        self.meter.start(worker)
        item = WorkItem(self.meter.t, self.endpoint.time_ns())
        if worker == self.endpoint.rank:
            self._item = item
        else:
            self._outbox.send(worker, item)

    def _remove_worker(self, worker: int) -> None:
        """Issue the work items of a worker that computes no more gradients to others."""
        if worker in self.living:
            self.living.remove(worker)
        self._outbox.remove_worker(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        for _ in range(self.meter.give_up(worker)):
            for other in self._choose(None) if self.living else ():
                self._send_model(other)

    def metrics(self) -> dict[str, float]:
        """Return delays and concurrency, on the server, since the start or the last resumption."""
        if self.endpoint.rank != 0:
            return {}
        meter = self.meter
        return {
            "applied": meter.applied,
            "server_delay_mean": meter.applied_average,
            "server_delay_average": meter.average,
            "server_delay_max": meter.maximum,
            "delayed_fraction": meter.fraction_above(self.threshold),
            "concurrency": meter.concurrency,
            "concurrency_max": meter.concurrency_max,
        }
