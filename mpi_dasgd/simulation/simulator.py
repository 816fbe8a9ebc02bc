"""Simulation: the algorithms, unchanged, on many virtual ranks with given speeds, latency and bandwidth."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator

import numpy as np

from mpi_dasgd.algorithms.base import ABSORBED, APPLIED, INITIATED, SKIPPED, ExchangeRecord
from mpi_dasgd.algorithms.build import build_run
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.compute_times import ComputeTimes
from mpi_dasgd.simulation.local_optimizer import NumpyLocalOptimizer
from mpi_dasgd.simulation.recorded_times import RecordedTimes, recorded_times
from mpi_dasgd.simulation.trace import Trace
from mpi_dasgd.staleness.version_vectors import SetStaleness
from mpi_dasgd.tasks import convex
from mpi_dasgd.transport.control_words import READY
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network

__all__ = ["Simulator", "simulate"]


class Simulator:
    """n virtual ranks.

    Args:
        config: sections simulation, task, optimizer, schedule, budget, algorithm, topology, codec,
            transport and run.seed count. One gradient is `task.batch_size` samples of the budget.
        endpoint: makes the endpoint of a rank; tests pass broken ones.

    Raises:
        UserError: if the configuration cannot be simulated.
    """

    def __init__(
        self, config: Config, endpoint: Callable[[Network, int], VirtualEndpoint] = VirtualEndpoint
    ) -> None:
        settings = config.simulation
        self.config = config
        self.size = settings.ranks
        self.max_gradients = self._budget()
        momentum, decay = self._optimizer()
        parts = build_run(config, self.size)
        workers = parts.algorithm_cls.workers(self.size, config.algorithm)
        self.problem = convex.build(config, workers)
        seed = config.run.seed
        dtype = np.dtype(settings.dtype)
        dimension = self.problem.start.size
        self.codecs = [parts.make_codec(rank, dimension, dtype) for rank in range(self.size)]
        self.clock = Clock()
        memory = SharedMemory(
            self.codecs[0].layout,
            self.size,
            publication_slots=parts.publication_slots,
            inbox_slots=parts.inbox_slots,
        )
        self.network = Network(
            self.clock,
            memory,
            parts.topology,
            latency=settings.latency,
            bandwidth=settings.bandwidth,
        )
        self.models = np.tile(self.problem.start.astype(dtype), (self.size, 1))
        if not settings.gradients:
            self.models += np.random.default_rng([seed, 2]).normal(size=self.models.shape)
        self._expected_sum = self.models.sum(0, dtype=np.float64)  # what conservation demands
        self.locals = [
            NumpyLocalOptimizer(x, momentum, decay, self._expected_sum) for x in self.models
        ]
        self.endpoints = [endpoint(self.network, rank) for rank in range(self.size)]
        self.algorithms = [
            parts.make_algorithm(endpoint, codec, x, self._record)
            for endpoint, codec, x in zip(self.endpoints, self.codecs, self.models, strict=True)
        ]
        for algorithm, local in zip(self.algorithms, self.locals, strict=True):
            algorithm.local, local.algorithm = local, algorithm
        self._lockstep = parts.lockstep
        self._times: ComputeTimes | RecordedTimes
        if settings.compute_time == "recorded":
            if settings.recorded_run is None:
                raise UserError("simulation.recorded_run: 'recorded' needs the directory of a run")
            self._times = recorded_times(settings.recorded_run, self.size)
        else:
            self._times = ComputeTimes(settings)
        self._time_rng = [_rng(seed, i, 4) for i in range(self.size)]
        self._noise_rng = [_rng(seed, i, 5) for i in range(self.size)]
        self._schedule, self._step_rule = parts.schedule, parts.step_rule
        self.gradients = 0
        self.waits = 0
        self.ages, self.ages_s = array("q"), array("d")  # 8 bytes each: there may be millions
        self.delays = array("q")
        self.exchange_counts = {INITIATED: 0, ABSORBED: 0, SKIPPED: 0, APPLIED: 0}
        self._waiting_since: dict[int, float] = {}  # since when ranks wait in the middle of a step
        self.wait_time = 0.0
        self.trace = Trace()
        self.sample_every = max(50, self.size)  # gradients between two samples of the trace
        self.diverged = False
        self.staleness: SetStaleness | None = None

    def _budget(self) -> int:
        budget = self.config.budget
        if budget.samples is None:
            raise UserError("budget.samples: `simulate` needs it, as in budget.samples=4000")
        return max(1, budget.samples // self.config.task.batch_size)

    def _optimizer(self) -> tuple[float, float]:
        optimizer = self.config.optimizer
        options = dict(optimizer.options)
        momentum, decay = options.pop("momentum", 0.0), options.pop("weight_decay", 0.0)
        if (
            optimizer.name != "SGD"
            or options
            or isinstance(momentum, list)
            or isinstance(decay, list)
        ):
            raise UserError(
                "optimizer: `simulate` knows SGD with momentum and weight_decay, got "
                f"{optimizer.name} {dict(optimizer.options)}"
            )
        return float(momentum), float(decay)

    def _record(self, exchange: ExchangeRecord) -> None:
        self.exchange_counts[exchange.kind] += 1
        if exchange.kind in (INITIATED, APPLIED):
            self.ages.append(exchange.step - exchange.partner_step)
            self.ages_s.append(exchange.age_s)

    def run(self) -> dict[str, object]:
        """Simulate until the budget is spent; return the figures that `simulate --json` prints."""
        begun = time.perf_counter()
        for algorithm in self.algorithms:
            algorithm.start()
        versions = [a.versions for a in self.algorithms if a.versions is not None]
        self.staleness = SetStaleness(versions) if versions else None
        for rank in range(self.size):
            self._start_gradient(rank)
        self._sample()
        while not self.diverged and self.clock.advance():
            pass
        seconds = time.perf_counter() - begun
        if not self.diverged:
            self._sample()
        figures = self._figures(seconds)
        for algorithm in reversed(self.algorithms):  # of equal names rank 0's counts
            figures |= algorithm.metrics()
        if not self.diverged:
            self.drain()
            figures["drained_disagreement"] = float(np.abs(self.models - self.models[0]).max())
        return figures

    def drain(self) -> None:
        """End as a real run does: give back what is held, deliver and absorb what is on its way."""
        left: set[int] = set()  # a rank that is stuck may come free when others absorb
        moved = -1
        while moved != (moved := self._messages_moved):
            for rank in set(range(self.size)) - self._waiting_since.keys() - left:
                left.add(rank)
                self._finalize(self.algorithms[rank].finalize())
            while self.clock.advance():
                pass
            for rank in left:
                self.algorithms[rank].absorb(self.locals[rank].local_step)

    @property
    def _messages_moved(self) -> int:
        """Messages sent and received so far, those on their way counted apart."""
        counters = [endpoint.counters for endpoint in self.endpoints]
        on_their_way = sum(not endpoint.is_flushed() for endpoint in self.endpoints)
        return sum(c.messages + c.absorbed for c in counters) + on_their_way

    def _finalize(self, rest: Iterator[Request]) -> None:
        for pending in rest:
            self.network.notify(pending, lambda: self._finalize(rest))
            return

    def _start_gradient(self, rank: int) -> None:
        self.locals[rank].gradients_seen = self.network.gradients
        if not self.algorithms[rank].computes_gradients:
            self._serve(rank)
            return
        delay = self._times.draw(rank, self._time_rng[rank])
        self.clock.after(delay, lambda: self._on_gradient_ready(rank))

    def _on_gradient_ready(self, rank: int) -> None:
        """A gradient is ready: one step of the algorithm."""
        local = self.locals[rank]
        done = local.local_step * self.size if self._lockstep else self.gradients
        if done >= self.max_gradients:
            return
        local.local_step += 1
        local.lr = self._lr(local)
        self.gradients += 1
        endpoint = self.endpoints[rank]
        endpoint.report_gradients(local.local_step)
        if not self.algorithms[rank].capabilities.applies_step_rule:
            delay = endpoint.gradients() - local.gradients_seen - 1
            local.lr *= self._step_rule(delay)
            self.delays.append(delay)
        if self.config.simulation.gradients:
            x = self.models[rank]
            local.gradient[:] = self.problem.gradient(rank, x, self._noise_rng[rank])
        self._resume(rank, self.algorithms[rank].step(local))

    def _lr(self, local: NumpyLocalOptimizer) -> float:
        """Learning rate by global progress, which ranks that go in step know without looking."""
        done = local.local_step * self.size if self._lockstep else self.gradients
        factor = self._schedule.factor(done / self.max_gradients)
        return self.config.optimizer.lr * factor

    def _serve(self, rank: int) -> None:
        """A rank that computes no gradients: serve now, and at the moment when something arrives."""
        self.network.servers[rank] = lambda: self._serve(rank)
        local = self.locals[rank]
        local.lr = self._lr(local)
        while self.algorithms[rank].serve(local):
            pass

    def _resume(self, rank: int, step: Iterator[Request]) -> None:
        """Go on with a step; where it must wait, have what it waits for come back here."""
        self.wait_time += self.clock.now - self._waiting_since.pop(rank, self.clock.now)
        for pending in step:
            self.waits += 1
            self._waiting_since[rank] = self.clock.now
            self.network.notify(pending, lambda: self._resume(rank, step))
            return
        if self.gradients % self.sample_every == 0:
            self._sample()
        if self.staleness is not None:
            self.staleness.update(rank)
        if isinstance(self._times, RecordedTimes):
            self.clock.after(self._times.exchange_seconds(rank), lambda: self._start_gradient(rank))
        else:
            self._start_gradient(rank)

    def _in_flight(self) -> np.ndarray:
        """Sum of the deltas that were sent and not absorbed."""
        total = np.zeros(self.models.shape[1])
        memory = self.network.memory
        word_map = memory.word_map
        for rank in range(self.size):
            for slot, index in enumerate(word_map.inbox):
                if memory.read(rank, index) & 3 == READY:
                    message = memory.view(rank, len(word_map.publication) + slot)
                    total += self.algorithms[rank].mass_of(message)
        return total

    def _sample(self) -> None:
        self.diverged = self.trace.append(
            self.gradients, self.clock.now, self.models, self.mean_model(), self.problem.optimum
        )

    def mean_model(self) -> np.ndarray:
        """Return the mean of the models that are trained, (elements,) float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            trained = self.algorithms[0].model_ranks(self.size)
            if len(trained) == self.size:
                return np.asarray(self.models.mean(0, dtype=np.float64))
            models = [self.algorithms[rank].model for rank in trained]
            return np.asarray(np.mean(models, axis=0, dtype=np.float64))

    def _figures(self, seconds: float) -> dict[str, object]:
        kind = self.algorithms[0]
        error = total = None
        mean = self.mean_model()
        if kind.capabilities.preserves_mean:
            total = np.sum([a.mass() for a in self.algorithms], axis=0, dtype=np.float64)
            total += self._in_flight()
            scale = np.abs(self.models).sum(0, dtype=np.float64).max()
            error = _number(float(np.abs(total - self._expected_sum).max() / scale))
            mean = total / self.size
        return {
            "name": self.config.run.name,
            "algorithm": self.config.algorithm.name,
            "codec": self.codecs[0].name,
            "topology": self.config.topology.graph,
            "ranks": self.size,
            "gradients": self.gradients,
            "effective_step": self._effective_step(mean),
            "max_disagreement": _number(max(self.trace.consensus_distance)),
            "final_disagreement": _number(self.trace.consensus_distance[-1]),
            "final_distance": _number(self.trace.distance[-1]),
            "excess_loss": _number(
                self.problem.value(mean) - self.problem.value(self.problem.optimum)
            ),
            "conservation_error": error,
            "waits": self.waits,
            "wait_time": self.wait_time,
            "exchanges": self.exchange_counts[INITIATED],
            "skipped": self.exchange_counts[SKIPPED],
            "bytes_per_message": self.codecs[0].layout.nbytes,
            "rejected": self._rejected(),
            "staleness_mean": float(np.mean(self.ages)) if self.ages else None,
            "staleness_max": max(self.ages) if self.ages else None,
            "set_staleness_mean": self.staleness.average if self.staleness else None,
            "set_staleness_max": self.staleness.maximum if self.staleness else None,
            "delay_mean": float(np.mean(self.delays)) if self.delays else None,
            "delay_max": max(self.delays) if self.delays else None,
            "virtual_time": self.clock.now,
            "events": self.clock.events,
            "seconds": seconds,
            "events_per_second": self.clock.events / seconds,
            "diverged": self.diverged,
        }

    def _rejected(self) -> float | None:
        """Share of the buckets that could not be decoded; None for a codec that decodes all."""
        counters = [codec.counters for codec in self.codecs]
        if not counters[0]:
            return None
        rejected = sum(c["buckets_rejected"] for c in counters)
        return rejected / max(1, rejected + sum(c["buckets_decoded"] for c in counters))

    def _effective_step(self, mean: np.ndarray) -> float | None:
        """Decay of the mean over that of plain SGD with T/n steps; None where that is not defined.

        On coordinate k of a noise-free quadratic one gradient of n ranks multiplies the mean by
        (1 - eta c_k)^(1/n) if its effective step is 1.
        """
        problem, config = self.problem, self.config
        plain = config.schedule.name == "constant" and config.schedule.warmup == 0
        options = config.optimizer.options
        if (
            not isinstance(problem, convex.Quadratic)
            or problem.noise
            or not config.simulation.gradients
            or not plain
            or any(options.values())
            or self.diverged
        ):
            return None
        expected = np.log1p(-config.optimizer.lr * problem.curvature) * self.gradients / self.size
        ratio = mean / problem.start
        if not (ratio > 0).all():
            return None
        return float(np.log(ratio).sum() / expected.sum())


def _rng(seed: int, rank: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, rank, purpose])


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def simulate(config: Config) -> dict[str, object]:
    """Run one simulation; see `Simulator.run`."""
    return Simulator(config).run()
