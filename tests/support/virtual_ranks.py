"""Virtual ranks of one algorithm without a driver: a test chooses who steps, and sees all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd import algorithms, config, topology
from mpi_dasgd.algorithms import peer_rng
from mpi_dasgd.algorithms.records import ExchangeRecord
from mpi_dasgd.codecs import NoCodec
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.simulation.simulator import simulate
from mpi_dasgd.transport.control_words import READY
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"


def run(*overrides: str) -> dict[str, Any]:
    """The figures of one simulation of `jobs/sim_quadratic.toml`."""
    return simulate(config.load(JOB, ["simulation.dimension=2", *overrides]))


def effective_step(*overrides: str, seeds: int = 2) -> float:
    """Mean over seeds."""
    found = [run(f"run.seed={seed}", *overrides)["effective_step"] for seed in range(1, seeds + 1)]
    return float(np.mean(found))


class Local:
    """A gradient of 1 in every coordinate, unless a test says otherwise, at a rate of 1."""

    def __init__(self, x: np.ndarray) -> None:
        self.local_step = 0
        self.gradient = np.ones_like(x)
        self._x = x

    def fused_update(self, lr_scale: float = 1.0) -> None:
        """Return None: steps are made by `apply`."""

    def apply(self, lr_scale: float = 1.0) -> None:
        """One step."""
        self._x -= lr_scale * self.gradient


class Ranks:
    """All ranks of one algorithm on one graph, without latency.

    Args:
        models: shape (n, d), float64; one row per rank.
        settings: section ``algorithm``.
        graph: over n ranks; None: complete.
    """

    def __init__(
        self, models: np.ndarray, settings: AlgorithmConfig, graph: topology.Topology | None = None
    ) -> None:
        self.models = models
        size, elements = models.shape
        codec = NoCodec(elements, models.dtype)
        algorithm_cls = algorithms.find(settings.name, settings.variant)
        trailer_words = algorithm_cls.trailer_words(size)
        codec.layout = dataclasses.replace(codec.layout, trailer_words=trailer_words)
        self.memory = SharedMemory(codec.layout, size)
        network = Network(Clock(), self.memory, graph or topology.build("complete", size))
        self.records: list[ExchangeRecord] = []
        self.locals = [Local(x) for x in models]
        self.algorithms = [
            algorithm_cls(
                VirtualEndpoint(network, rank),
                codec,
                x,
                settings,
                peer_rng(1, rank),
                self.records.append,
            )
            for rank, x in enumerate(models)
        ]
        for algorithm in self.algorithms:
            algorithm.start()

    def step(self, rank: int) -> bool:
        """One step of a rank; return False, with the step given up, where it would have to wait."""
        local = self.locals[rank]
        local.local_step += 1
        return next(iter(self.algorithms[rank].step(local)), None) is None

    def refresh(self) -> None:
        """Bring all deltas home, and publish all models again: then any pair may be next."""
        for algorithm, local in zip(self.algorithms, self.locals, strict=True):
            algorithm.absorb(local.local_step)
            algorithm.restart(local.local_step)

    def now(self) -> np.ndarray:
        """The vectors that exchanges move, with what is in flight to them."""
        word_map = self.memory.word_map
        found = np.array([algorithm.mass() for algorithm in self.algorithms])
        for rank, algorithm in enumerate(self.algorithms):
            for slot, index in enumerate(word_map.inbox):
                if self.memory.read(rank, index) & 3 == READY:
                    message = self.memory.view(rank, len(word_map.publication) + slot)
                    found[rank] += algorithm.mass_of(message)
        return found


class Fixed:
    """A source of random choices that always answers with the same partner."""

    def __init__(self, partner: int) -> None:
        self._partner = partner

    def sample(self, population: Sequence[int], count: int) -> list[int]:
        return [self._partner]

    def choice(self, population: Sequence[int]) -> int:
        return self._partner


def dispersion(models: np.ndarray) -> float:
    """sum_i |x_i - mean|^2."""
    return float(np.square(models - models.mean(0)).sum())
