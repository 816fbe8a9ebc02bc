"""Asynchronous SGD with a server (Koloskova, Stich, Jaggi; NeurIPS 2022; arXiv 2206.08307).

Rank 0 keeps the model x and applies every gradient with the full rate when it arrives. Algorithm 1, and
Algorithm 2 for data that differ between clients (`client_sampling` = uniform):

1. start:    C_0: all workers hold x_0, or the first `concurrency` of them; beyond one each points queue
2. server:   gradient t arrives from j_t, who began it at x_s:  tau_t = t - s,
             x_{t+1} <- x_t - eta(tau_t) grad F(x_s, xi)
3. server:   give x_{t+1} to A_t: Algorithm 1: a worker without a point, which is j_t if all had one;
             Algorithm 2: k_t drawn uniformly from all workers, busy or not; there it waits its turn
4. worker:   computes its gradient at the point it has, sends it, and takes the next point, or waits for it

eta(tau) is the rule of Theorem 8 (`delay_adaptive_rule`), with tau_C = the concurrency unless `delay_threshold` is set.
Algorithm 1 favours the data of fast workers, and so does that rule; the draw of Algorithm 2 does not.

A worker that leaves says so, and the server gives its points to others, as it does if a worker dies. A
server that works (`server_trains`) serves between its own gradients, which are delayed like any other; the
paper's does not work. The optimizer, and its momentum, are the server's; the paper has plain SGD.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mpi_dasgd.algorithms.base import APPLIED, ExchangeRecord, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.server import ServerAlgorithm
from mpi_dasgd.algorithms.work_queue import SHUTDOWN, Outbox, WorkItem, send_work_item
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.staleness.delay_meter import DelayMeter
from mpi_dasgd.staleness.step_rule import delay_rule
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request, SendBuffer
from mpi_dasgd.transport.inbox import ReceivedMessage

__all__ = ["ASGD"]


class ASGD(ServerAlgorithm):
    """A server that applies gradients as they arrive."""

    name = "asgd"
    description = Description(
        paper="Koloskova et al. 2022, arXiv 2206.08307",
        exchanges="gradients to a server, its model back",
        traffic="M; server: (n-1) M",
        memory="4 M; server, more for each point without room: P",
        waits="for the server's answer; with client_sampling = uniform or a low concurrency, for a point",
        effective_step="n",
    )
    capabilities = Capabilities(
        preserves_mean=False,
        applies_step_rule=True,
        uses_publication=False,
        minimum_ranks=2,
    )
    config_keys = ("client_sampling", "concurrency", "server_trains", "delay_threshold")

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """Two words: a job."""
        return 2

    @classmethod
    def validate_requirements(cls, ranks: int, settings: Settings, graph: Topology) -> None:
        """Refuse what a server that gives out points cannot do."""
        super().validate_requirements(ranks, settings, graph)
        if settings.local_steps != 1:
            raise UserError(
                f"algorithm.local_steps: {cls.name!r} sends every gradient, expected 1, got "
                f"{settings.local_steps}; easgd makes local steps"
            )
        if settings.server_trains and (
            settings.client_sampling == "uniform" or settings.concurrency
        ):
            raise UserError(
                "algorithm.server_trains: with client_sampling = uniform or a concurrency, rank 0 would "
                "have to compute at points that its model has left; expected false, got true"
            )

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Warn of what favours the data of fast workers, and of a server that is slow to answer."""
        warnings = super().warnings(config)
        sharded = config.task.data == "sharded" or config.simulation.heterogeneity > 0
        if sharded and config.algorithm.client_sampling == "idle":
            warnings.append(
                "algorithm.client_sampling: 'idle' with data that differ between ranks favours the data "
                "of fast ranks; 'uniform' does not (Koloskova et al. 2022, section 5)"
            )
        return warnings

    def start(self) -> None:
        """Line 1: all workers hold x_0."""
        super().start()
        self._first = 0  # iteration at which this part of the run begins
        self._begin(holding=self.endpoint.size)

    def restart(self, step: int) -> None:
        """Gradients that were on their way at a checkpoint are lost: all wait for a point."""
        self._begin(holding=0)

    def _begin(self, holding: int) -> None:
        """Begin with `concurrency` points given out, the first to at most `holding` workers that have it."""
        rank, workers = self.endpoint.rank, self.workers(self.endpoint.size, self.settings)
        concurrency = self.settings.concurrency or len(workers)
        holders = workers[: min(concurrency, holding)]
        self._item = WorkItem(self._first, self.endpoint.time_ns()) if rank in holders else None
        self._items: deque[ReceivedMessage] = deque()  # a worker's next ones
        if rank != 0:
            return
        self.meter = DelayMeter(self._first)
        threshold = self.settings.delay_threshold
        self.threshold = concurrency if threshold is None else threshold
        self._rule = delay_rule(self.settings, concurrency)
        self._idle = deque(workers[concurrency:])  # without a point, longest first
        self._due = [workers[i % len(workers)] for i in range(len(holders), concurrency)]
        self._outbox = Outbox(self.endpoint, self.x)
        for worker in holders:
            self.meter.start(worker)

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Line 4: send the gradient, take the next point."""
        if self.endpoint.rank == 0:
            yield from self._work(local)
            return
        if self._item is not None:  # else the gradient is of no point that was given
            yield from self._send(self._item, local.gradient, local.local_step)
            self._item = None
        inbox = self.endpoint.inbox
        while not self._items:
            arrival = self.endpoint.wait_until(lambda: inbox.has_messages)
            while not arrival.test():
                yield arrival
            self._items.extend(inbox.receive())
        point = self._items.popleft()
        self.x[:] = point.message.payload
        self._item = WorkItem(*point.message.trailer.tolist())
        inbox.free(point)

    def _send(self, job: WorkItem, gradient: np.ndarray | None, step: int) -> Iterator[Request]:
        """Send a gradient, or a farewell, to the server; wait for room in its inbox."""
        endpoint = self.endpoint
        posting: SendBuffer | None = None

        def room() -> bool:
            nonlocal posting
            posting = posting or endpoint.acquire_send_buffer(0)
            return posting is not None

        there = endpoint.wait_until(room, (0,))
        while not there.test():
            yield there
        assert posting is not None
        send_work_item(endpoint, posting, job, gradient, step)

    def _work(self, local: LocalOptimizer) -> Iterator[Request]:
        """A gradient of the server's own: those that have arrived come first."""
        own = local.gradient.copy()
        self.serve(local)
        if self._item is not None:
            job, self._item = self._item, None
            local.gradient[:] = own
            self._apply(local, 0, job)
        while self._item is None:
            something = self.endpoint.wait_until(self.end_training)
            while not something.test():
                yield something
            self.serve(local)

    def serve(self, local: LocalOptimizer) -> int:
        """Lines 2 and 3 for all gradients that have arrived; return how many messages there were."""
        for worker in self.lost():
            self._remove_worker(worker)
        due, self._due = self._due, []
        for worker in due:
            self._send_model(worker)
        arrivals = self.endpoint.inbox.receive()
        for arrival in arrivals:
            job = WorkItem(*arrival.message.trailer.tolist())
            if job != SHUTDOWN:
                local.gradient[:] = arrival.message.payload
            self.endpoint.inbox.free(arrival)
            if job == SHUTDOWN:
                self._remove_worker(arrival.sender)
            elif self.meter.holds(arrival.sender, job.start):  # else it was given up
                self._apply(local, arrival.sender, job)
        self._outbox.send_waiting()
        return len(arrivals)

    def _apply(self, local: LocalOptimizer, client: int, job: WorkItem) -> None:
        iteration = self.meter.t
        delay = self.meter.apply(client, job.start)
        factor = self._rule(delay)
        if factor > 0:  # else it is dropped, and must not move a momentum either
            local.apply(factor)
        chosen = self._choose(client)
        for worker in chosen:
            self._send_model(worker)
        age = (self.endpoint.time_ns() - job.time_ns) * 1e-9
        nbytes = len(chosen) * self.codec.layout.nbytes
        self.record(ExchangeRecord(iteration, client, APPLIED, job.start, age, nbytes, 0))

    def _choose(self, client: int | None) -> Sequence[int]:
        """Line 3: who is given the newest point, after `client`'s gradient, or for a job given up."""
        if self.settings.client_sampling == "uniform":
            return (self.rng.choice(self.living),)
        if client is not None:
            self._idle.append(client)
        return (self._idle.popleft() if self._idle else self.rng.choice(self.living),)

    def _send_model(self, worker: int) -> None:
        """A job begins: `worker` is given x_t, now or when there is room for it."""
        self.meter.start(worker)
        job = WorkItem(self.meter.t, self.endpoint.time_ns())
        if worker == self.endpoint.rank:
            self._item = job
            return
        self._outbox.send(worker, job)

    def _remove_worker(self, worker: int) -> None:
        """`worker` computes no more: its points go to others."""
        if worker in self.living:
            self.living.remove(worker)
        self._outbox.remove_worker(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        for _ in range(self.meter.give_up(worker)):
            for other in self._choose(None) if self.living else ():
                self._send_model(other)

    def absorb(self, step: int) -> None:
        """The server serves on; a worker that has left makes room for points that still come."""
        if self.endpoint.rank == 0:
            if self.departing or not self.computes_gradients:  # else its own point would move
                self.serve(self.local)
        elif self.departing:
            self._items.extend(self.endpoint.inbox.receive())
            while self._items:
                self.endpoint.inbox.free(self._items.popleft())

    def finalize(self) -> Iterator[Request]:
        """A worker says farewell: nobody is to wait for it."""
        yield from super().finalize()
        if self.endpoint.rank == 0:
            self._remove_worker(0)
        else:
            yield from self._send(SHUTDOWN, None, 0)

    def metrics(self) -> dict[str, float]:
        """Delays and concurrency, on the server; those of this part of the run if it was resumed."""
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

    def state(self) -> dict[str, np.ndarray]:
        """The server's iteration; points that are given out are not part of it."""
        return {"iteration": np.array(self.meter.t)} if self.endpoint.rank == 0 else {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back the iteration."""
        if "iteration" in arrays:
            self._first = int(arrays["iteration"])
