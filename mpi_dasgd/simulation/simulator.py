"""Event loop of a simulation: the algorithms, unchanged, on virtual ranks and a virtual clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from mpi_dasgd.algorithms.build import RunParts, build_run
from mpi_dasgd.algorithms.records import ExchangeRecord
from mpi_dasgd.codecs.message import Layout
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.compute_times import ComputeTimes
from mpi_dasgd.simulation.conservation import ConservationOracle
from mpi_dasgd.simulation.drain import drain
from mpi_dasgd.simulation.local_optimizer import NumpyLocalOptimizer
from mpi_dasgd.simulation.metrics import RunMeter, collect_metrics
from mpi_dasgd.simulation.recorded_times import RecordedTimes, recorded_times
from mpi_dasgd.simulation.trace import Trace
from mpi_dasgd.staleness.version_vectors import SetStaleness
from mpi_dasgd.tasks import convex
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network

__all__ = ["Simulator", "simulate"]


class Simulator:
    """Runs an algorithm on virtual ranks.

    Args:
        config: sections simulation, task, optimizer, schedule, budget, algorithm, topology, codec,
            transport and run.seed count. One gradient is `task.batch_size` samples of the budget.
        make_endpoint: makes the endpoint of a rank; tests pass broken ones.
        sample_every: gradients between two samples of the trace; None for a default.
        on_sample: called with the simulator after every sample of the trace.
        on_exchange: called with every exchange, after `meter` has counted it.

    Attributes:
        config: as given.
        size: number of ranks.
        max_gradients: gradients after which no other starts.
        problem: what is minimized.
        models: models of all ranks, (ranks, elements).
        codecs, endpoints, algorithms, locals: parts of each rank.
        clock, network: parts that all ranks share.
        gradients: gradients that all ranks have computed so far.
        meter: counts of the run.
        oracle: what the sum of all mass must be.
        trace: samples of the run.
        diverged: whether the newest sample is too far from the optimum, or not finite.
        waiting_since: virtual time since when ranks wait in the middle of a step, by rank.
        set_staleness: meter of the version vectors; None for an algorithm without them.

    Raises:
        UserError: if the configuration cannot be simulated.
    """

    def __init__(
        self,
        config: Config,
        make_endpoint: Callable[[Network, int], VirtualEndpoint] = VirtualEndpoint,
        *,
        sample_every: int | None = None,
        on_sample: Callable[[Simulator], None] | None = None,
        on_exchange: Callable[[ExchangeRecord], None] | None = None,
    ) -> None:
        settings, seed = config.simulation, config.run.seed
        self.config = config
        self.size = settings.ranks
        self.max_gradients = _max_gradients(config)
        dtype = np.dtype(settings.dtype)
        parts = build_run(config, self.size, dtype)
        workers = parts.algorithm_cls.workers(self.size, config.algorithm)
        self.problem = convex.build(config, workers)
        dimension = self.problem.start.size
        try:
            self.codecs = [parts.make_codec(rank, dimension, dtype) for rank in range(self.size)]
        except UserError as error:
            raise UserError(f"{error} (simulation.dtype is {settings.dtype})") from None
        self.network = _build_network(parts, self.codecs[0].layout)
        self.clock = self.network.clock
        self.models = np.tile(self.problem.start.astype(dtype), (self.size, 1))
        if not settings.gradients:
            self.models += np.random.default_rng([seed, 2]).normal(size=self.models.shape)
        self.oracle = ConservationOracle(self.models)
        self.meter = RunMeter()
        self._on_exchange = on_exchange
        self.locals = [NumpyLocalOptimizer(x, config.optimizer) for x in self.models]
        self.endpoints = [make_endpoint(self.network, rank) for rank in range(self.size)]
        record = self.meter.record if on_exchange is None else self._record
        self.algorithms = [
            parts.make_algorithm(endpoint, codec, x, record)
            for endpoint, codec, x in zip(self.endpoints, self.codecs, self.models, strict=True)
        ]
        for algorithm, local in zip(self.algorithms, self.locals, strict=True):
            algorithm.local = local
            local.on_decrement = self.oracle.observer(algorithm)
        # Looked up once: an event takes 20 us.
        self._measures_delays = not parts.algorithm_cls.capabilities.applies_step_rule
        self._computes_gradients, self._base_lr = settings.gradients, config.optimizer.lr
        self._lockstep = parts.lockstep
        self._schedule, self._step_rule = parts.schedule, parts.step_rule
        self._times = _step_times(config)
        self._time_rngs = [np.random.default_rng([seed, rank, 4]) for rank in range(self.size)]
        self._noise_rngs = [np.random.default_rng([seed, rank, 5]) for rank in range(self.size)]
        self.waiting_since: dict[int, float] = {}
        self._sample_every = sample_every or max(50, self.size)
        self._on_sample = on_sample
        self.gradients = 0
        self.trace = Trace()
        self.diverged = False
        self.set_staleness: SetStaleness | None = None

    def _record(self, exchange: ExchangeRecord) -> None:
        self.meter.record(exchange)
        if self._on_exchange is not None:
            self._on_exchange(exchange)

    def run(self) -> dict[str, object]:
        """Simulate until the budget is spent; return the metrics that `simulate --json` prints."""
        started = time.perf_counter()
        for algorithm in self.algorithms:
            algorithm.start()
        versions = [a.versions for a in self.algorithms if a.versions is not None]
        self.set_staleness = SetStaleness(versions) if versions else None
        for rank in range(self.size):
            self._start_gradient(rank)
        self._sample()
        while not self.diverged and self.clock.advance():
            pass
        wall_seconds = time.perf_counter() - started
        if not self.diverged:
            self._sample()
        metrics = collect_metrics(self, wall_seconds)
        for algorithm in reversed(self.algorithms):  # of equal names rank 0's counts
            metrics |= algorithm.metrics()
        if not self.diverged:
            self.drain()
            metrics["drained_disagreement"] = float(np.abs(self.models - self.models[0]).max())
        return metrics

    def stop(self) -> None:
        """Compute no more gradients; those that are being computed are discarded."""
        self.max_gradients = self.gradients

    def drain(self) -> None:
        """End as a real run does: release claims, deliver and absorb what is in flight."""
        drain(self)

    def _start_gradient(self, rank: int) -> None:
        self.locals[rank].gradients_seen = self.network.gradients
        if not self.algorithms[rank].computes_gradients:
            self._serve(rank)
            return
        delay = self._times.draw(rank, self._time_rngs[rank])
        self.clock.after(delay, lambda: self._on_gradient_ready(rank))

    def _on_gradient_ready(self, rank: int) -> None:
        """Make one step of the algorithm with a gradient that is ready."""
        local = self.locals[rank]
        done = local.local_step * self.size if self._lockstep else self.gradients
        if done >= self.max_gradients:
            return
        local.local_step += 1
        local.lr = self._lr(local)
        self.gradients += 1
        endpoint = self.endpoints[rank]
        endpoint.report_gradients(local.local_step)
        if self._measures_delays:
            delay = endpoint.gradients() - local.gradients_seen - 1
            local.lr *= self._step_rule(delay)
            self.meter.delays.append(delay)
        if self._computes_gradients:
            x = self.models[rank]
            local.gradient[:] = self.problem.gradient(rank, x, self._noise_rngs[rank])
        self._resume(rank, self.algorithms[rank].step(local))

    def _lr(self, local: NumpyLocalOptimizer) -> float:
        """Return the learning rate by global progress, which lockstep ranks know without asking."""
        done = local.local_step * self.size if self._lockstep else self.gradients
        factor = self._schedule.factor(done / self.max_gradients)
        return self._base_lr * factor

    def _serve(self, rank: int) -> None:
        """Let a rank that computes no gradients serve now, and whenever a message arrives."""
        self.network.servers[rank] = lambda: self._serve(rank)
        local = self.locals[rank]
        local.lr = self._lr(local)
        while self.algorithms[rank].serve(local):
            pass

    def _resume(self, rank: int, step: Iterator[Request]) -> None:
        """Resume a step; where it must wait, come back here when its request is complete."""
        self.meter.wait_time += self.clock.now - self.waiting_since.pop(rank, self.clock.now)
        for request in step:
            self.meter.waits += 1
            self.waiting_since[rank] = self.clock.now
            self.network.notify(request, lambda: self._resume(rank, step))
            return
        if self.gradients % self._sample_every == 0:
            self._sample()
        if self.set_staleness is not None:
            self.set_staleness.update(rank)
        if isinstance(self._times, RecordedTimes):
            self.clock.after(self._times.exchange_seconds(rank), lambda: self._start_gradient(rank))
        else:
            self._start_gradient(rank)

    def _sample(self) -> None:
        self.diverged = self.trace.append(
            self.gradients, self.clock.now, self.models, self.mean_model(), self.problem.optimum
        )
        if self._on_sample is not None:
            self._on_sample(self)

    def mean_model(self) -> np.ndarray:
        """Return the mean of the models that are trained, (elements,) float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            trained = self.algorithms[0].model_ranks(self.size)
            if len(trained) == self.size:
                return np.asarray(self.models.mean(0, dtype=np.float64))
            models = [self.algorithms[rank].model for rank in trained]
            return np.asarray(np.mean(models, axis=0, dtype=np.float64))


def _build_network(parts: RunParts, layout: Layout) -> Network:
    settings = parts.config.simulation
    memory = SharedMemory(
        layout,
        settings.ranks,
        publication_slots=parts.publication_slots(),
        inbox_slots=parts.inbox_slots,
    )
    return Network(
        Clock(),
        memory,
        parts.topology,
        latency=settings.latency,
        bandwidth=settings.bandwidth,
    )


def _max_gradients(config: Config) -> int:
    """Return the budget in gradients."""
    if config.budget.samples is None:
        raise UserError("budget.samples: `simulate` needs it, as in budget.samples=4000")
    return max(1, config.budget.samples // config.task.batch_size)


def _step_times(config: Config) -> ComputeTimes | RecordedTimes:
    settings = config.simulation
    drawn = ComputeTimes(settings)  # made in any case: it refuses ranks that do not exist
    if settings.compute_time != "recorded":
        return drawn
    if settings.recorded_run is None:
        raise UserError("simulation.recorded_run: 'recorded' needs the directory of a run")
    return recorded_times(settings.recorded_run, settings.ranks)


def simulate(config: Config) -> dict[str, object]:
    """Run one simulation; see `Simulator.run`."""
    return Simulator(config).run()
