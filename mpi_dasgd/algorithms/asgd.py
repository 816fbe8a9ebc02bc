"""Asynchronous SGD with a server (Koloskova, Stich, Jaggi; NeurIPS 2022; arXiv 2206.08307).

Rank 0 keeps the model x and applies every gradient with the full rate when it is received.
Algorithm 1, and Algorithm 2 for data that differ between clients (`client_sampling` = uniform):

1. start:   C_0: all workers hold x_0, or the first `concurrency` of them; with more than one per
            worker, models queue
2. server:  gradient t arrives from j_t, which started it at x_s:  tau_t = t - s,
            x_{t+1} <- x_t - eta(tau_t) grad F(x_s, xi)
3. server:  send x_{t+1} to A_t: Algorithm 1: a worker without a model, which is j_t if all had one;
            Algorithm 2: k_t drawn uniformly from all workers, busy or not, where it queues
4. worker:  compute the gradient at the model received, send it, and take the next model, or wait
            for it

eta(tau) is the rule of Theorem 8 (`delay_adaptive_rule`), with tau_C = the concurrency unless
`delay_threshold` is set. Algorithm 1 favours the data of fast workers, and so does that rule; the
draw of Algorithm 2 does not.

A worker that departs tells the server, which issues its models to others, as it does if a worker
dies. A server that trains (`server_trains`) serves between its own gradients, which are delayed
like any other; the paper's does not train. The optimizer, and its momentum, are the server's; the
paper has plain SGD.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.communication import wait, wait_for_send_buffer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.gradient_server import GradientServer
from mpi_dasgd.algorithms.work_queue import LATEST, SHUTDOWN, WorkItem, send_work_item
from mpi_dasgd.config.schema import AlgorithmConfig, Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.staleness.delay_meter import DelayMeter
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.inbox import ReceivedMessage

__all__ = ["ASGD"]


class ASGD(GradientServer):
    """A server that applies gradients as they arrive."""

    name = "asgd"
    description = Description(
        paper="Koloskova et al. 2022, arXiv 2206.08307",
        exchanges="gradients to a server, its model back",
        traffic="M; server: (n-1) M",
        memory="4 M; server, more for each point that finds no slot: P",
        waits="for the server's answer; with client_sampling = uniform or a low concurrency, for "
        "a point",
        effective_step="n",
    )
    capabilities = Capabilities(
        preserves_mean=False,
        applies_step_rule=True,
        uses_publication=False,
        replicated=True,
        exchanges_gradients=True,
        minimum_ranks=2,
    )
    config_keys = ("client_sampling", "concurrency", "server_trains", "delay_threshold")

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """Return 2: a work item."""
        return 2

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse local steps, and a server that trains at models that are issued by choice.

        Raises:
            UserError: says why, and what would work.
        """
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
                "algorithm.server_trains: with client_sampling = uniform or a concurrency, rank 0 "
                "would have to compute at points that its model has left; expected false, got true"
            )

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """Warn of what favours the data of fast workers, and of a server that is slow to answer."""
        warnings = super().warnings(config)
        sharded = config.task.data == "sharded" or config.simulation.heterogeneity > 0
        if sharded and config.algorithm.client_sampling == "idle":
            warnings.append(
                "algorithm.client_sampling: 'idle' with data that differ between ranks favours "
                "the data of fast ranks; 'uniform' does not (Koloskova et al. 2022, section 5)"
            )
        return warnings

    def start(self) -> None:
        """Begin with x_0 at all workers (line 1)."""
        super().start()
        self._iteration_loaded = 0  # of the checkpoint, on the server
        self.meter = DelayMeter()
        self._begin(holding=self.endpoint.size)

    def restart(self, step: int) -> None:
        """Begin with no model issued: gradients that were in flight at a checkpoint are lost."""
        self.meter = DelayMeter(self._iteration_loaded)
        self._begin(holding=0)

    def reset(self, step: int) -> None:
        """Begin with the server's model at all workers, or at none if just some may hold it.

        Ranks do not know alike which of the others have died.
        """
        workers = self.workers(self.endpoint.size, self.settings)
        all_hold = (self.settings.concurrency or len(workers)) >= len(workers)
        self.list_workers()
        self._begin(holding=self.endpoint.size if all_hold else 0)

    def _begin(self, holding: int) -> None:
        """Begin with `concurrency` work items, the first of them at up to `holding` workers."""
        rank, workers = self.endpoint.rank, self.living
        concurrency = self.settings.concurrency or len(workers)
        holders = workers[: min(concurrency, holding)]
        start = LATEST if rank else self.meter.t
        self._item = WorkItem(start, self.endpoint.time_ns()) if rank in holders else None
        self._queue: deque[ReceivedMessage] = deque()  # a worker's next models
        if rank == 0:
            self._begin_serving(concurrency, holders)

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Send the gradient and take the next model (line 4)."""
        if self.endpoint.rank == 0:
            yield from self._train_on_server(local)
            return
        if self._item is not None:  # otherwise the gradient belongs to no work item
            yield from self._send(self._item, local.gradient, local.local_step)
            self._item = None
        inbox = self.endpoint.inbox
        while not self._queue:
            yield from wait(self.endpoint.wait_until(lambda: inbox.has_messages))
            self._queue.extend(inbox.receive())
        received = self._queue.popleft()
        self.x[:] = received.message.payload
        self._item = WorkItem(*received.message.trailer.tolist())
        inbox.free(received)

    def _send(self, item: WorkItem, gradient: np.ndarray | None, step: int) -> Iterator[Request]:
        """Send a gradient or `SHUTDOWN` to the server, waiting for a free slot of its inbox."""
        send_buffer = yield from wait_for_send_buffer(self.endpoint, 0)
        send_work_item(self.endpoint, send_buffer, item, gradient, step)

    def _train_on_server(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply a gradient of the server's own; those that have been received come first."""
        own_gradient = local.gradient.copy()
        self.serve(local)
        if self._item is not None:
            item, self._item = self._item, None
            local.gradient[:] = own_gradient
            self._apply(local, 0, item)
        while self._item is None:
            yield from wait(self.endpoint.wait_until(self.has_work))
            self.serve(local)

    def absorb(self, step: int) -> None:
        """Go on serving, on the server; free the inbox for models, on a departing worker."""
        if self.endpoint.rank == 0:
            if self.departing or not self.computes_gradients:  # else its own model would move
                self.serve(self.local)
        elif self.departing:
            self._queue.extend(self.endpoint.inbox.receive())
            while self._queue:
                self.endpoint.inbox.free(self._queue.popleft())

    def attend(self, step: int) -> None:
        """Go on serving, on the server."""
        if self.endpoint.rank == 0:
            self.serve(self.local)

    def finalize(self) -> Iterator[Request]:
        """Tell the server, on a worker, that no gradient will follow."""
        yield from super().finalize()
        if self.endpoint.rank == 0:
            self._remove_worker(0)
        else:
            yield from self._send(SHUTDOWN, None, 0)

    def state(self) -> dict[str, np.ndarray]:
        """Return the server's iteration; issued work items are not part of the state."""
        return {"iteration": np.array(self.meter.t)} if self.endpoint.rank == 0 else {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore the iteration."""
        if "iteration" in arrays:
            self._iteration_loaded = int(arrays["iteration"])
