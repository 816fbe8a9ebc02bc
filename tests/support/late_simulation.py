"""A late device on the virtual clock: what it reads and writes happens some time after the request.

The twin of `late_device.LateDevice`, for as many ranks and steps as one likes, and repeatable. The
swaps of a release are made one by one, at moments of their own, so that other ranks act in between.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from mpi_dasgd import config
from mpi_dasgd.codecs import Codec, ExchangeBuffers, Outcome
from mpi_dasgd.simulation.conservation import total_mass
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.transport.control_words import CLAIMED, FREE, HEAD, READY, pack_slot_word
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import Release
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network
from tests.support.late_codec import LateCodec
from tests.support.late_release import QueuedRelease

__all__ = ["LateSimulation", "VirtualQueue", "simulate_late"]

SETTINGS = (
    "task.name=quadratic", "task.batch_size=16", "budget.samples=8000", "optimizer.lr=0.05",
    "simulation.ranks=8", "simulation.dimension=2048", "simulation.noise=0.3",
    "simulation.dtype=float32", "simulation.compute_time=exponential", "codec.name=lattice8",
    "topology.graph=complete", "transport.publication_slots=6",
)  # fmt: skip
"""Those of the experiment in gpu.md, section 3.3, at a smaller size: 500 gradients."""


class VirtualQueue:
    """Work of a rank's device, in order, each piece 0.5 to 1.5 times `delay` after its request.

    Args:
        clock: virtual time.
        delay: mean delay.
        rank: of the device.
    """

    def __init__(self, clock: Clock, delay: float, rank: int) -> None:
        self._clock, self._delay = clock, delay
        self._dice = random.Random(rank)
        self._latest = 0.0

    def submit(self, work: Callable[[], object]) -> None:
        """Have `work` done later."""
        due = self._clock.now + self._delay * self._dice.uniform(0.5, 1.5)
        self._latest = max(self._latest, due)
        self._clock.after(self._latest - self._clock.now, lambda: work() and None)


class OrderMonitor:
    """Watches the control words of all ranks for orders that no reader may ever see.

    Args:
        network: whose memory is watched.

    Attributes:
        found: number of violations by name.
    """

    def __init__(self, network: Network) -> None:
        self._memory, self._on_write = network.memory, network.memory.on_write
        self._claimed: set[tuple[int, int]] = set()  # words of publications
        self.found: Counter[str] = Counter()
        network.memory.on_write = self._check

    def _check(self, rank: int, index: int, value: int) -> None:
        slots, key = self._memory.word_map.publication, (rank, index)
        if index == HEAD:
            word = self._memory.read(rank, slots[value & 0xFF])
            self.found["head before ready"] += word != pack_slot_word(READY, rank, value >> 8)
        elif index in slots and value & 3 == FREE:
            # A reader may free the version that it has claimed.
            is_newest = self._memory.read(rank, HEAD) == value >> 22 << 8 | slots.index(index)
            self.found["freed before the head moved"] += is_newest and key not in self._claimed
            self._claimed.discard(key)
        elif index in slots and value & 3 == CLAIMED:
            self._claimed.add(key)
        if self._on_write is not None:
            self._on_write(rank, index, value)


class WatchedCodec(LateCodec):
    """A late codec that sees whether a slot is written while the head still names it.

    A claim would be refused there, but a read without a claim takes what it finds.

    Attributes:
        overwritten: number of times.
    """

    overwritten = 0

    def __init__(self, inner: Codec, queue: VirtualQueue, memory: SharedMemory, rank: int) -> None:
        super().__init__(inner, queue)
        self._memory, self._rank = memory, rank

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> Outcome:
        head = self._memory.read(self._rank, HEAD)
        newest = self._memory.view(self._rank, head & 0xFF) if head else None
        self.overwritten += newest is not None and buffers.publication is newest
        return super().average_pair(x, buffers)


class LateSimulation:
    """A simulation whose exchanges are late.

    Args:
        overrides: of the configuration.
        delay: mean delay of all that a rank's device does, in mean steps.
        publication, release: the protocols; tests pass broken ones.

    Attributes:
        simulator: the simulation.
        codecs: codecs of the ranks.
    """

    def __init__(
        self,
        *overrides: str,
        delay: float,
        publication: type[Publication] = Publication,
        release: Callable[[int, Network, VirtualQueue], Release] | None = None,
    ) -> None:
        queues: list[VirtualQueue] = []
        self._releases: list[Release] = []

        def make_endpoint(network: Network, rank: int) -> VirtualEndpoint:
            queues.append(VirtualQueue(network.clock, delay, rank))
            made = release(rank, network, queues[-1]) if release else None
            self._releases.append(made or QueuedRelease(network.memory, queues[-1]))
            endpoint = VirtualEndpoint(network, rank, release=self._releases[-1])
            endpoint.publication.__class__ = publication
            return endpoint

        settings = config.load(None, [*SETTINGS, *overrides])
        self.simulator = simulator = Simulator(settings, make_endpoint)
        self._monitor = OrderMonitor(simulator.network)
        self.codecs = [
            WatchedCodec(codec, queue, simulator.network.memory, rank)
            for rank, (codec, queue) in enumerate(zip(simulator.codecs, queues, strict=True))
        ]
        simulator.codecs = list(self.codecs)
        for algorithm, codec in zip(simulator.algorithms, self.codecs, strict=True):
            algorithm.codec = codec

    def run(self) -> dict[str, float]:
        """Run to the end; return what is found.

        Launches, wrong uses of memory, required swaps that failed, largest deviation of the
        conserved sum, wrong orders, and counts of the simulation.
        """
        simulator, codecs = self.simulator, self.codecs
        figures = simulator.run()
        counters = [endpoint.counters for endpoint in simulator.endpoints]
        buckets = sum((Counter(codec.counters) for codec in codecs), Counter())
        return {
            "launches": sum(codec.work.launches for codec in codecs),
            "given back": sum(codec.work.given_back for codec in codecs),
            "taken away": sum(codec.work.taken_away for codec in codecs),
            "failed": sum(getattr(release, "failed", 0) for release in self._releases),
            "pending": sum(release.is_pending for release in self._releases),
            "sum off": self.sum_off(),
            "corrupt": buckets["buckets_corrupt"],
            "rejected": buckets["buckets_rejected"] / max(1, buckets["buckets_decoded"]),
            "publications": sum(counts.publications for counts in counters),
            "unpublished": sum(counts.publications_skipped for counts in counters),
            **{name: float(str(figures[name])) for name in ("exchanges", "skipped")},
            "overwritten": sum(codec.overwritten for codec in codecs),
            "head before ready": self._monitor.found["head before ready"],
            "freed before the head moved": self._monitor.found["freed before the head moved"],
        }

    def sum_off(self, *, in_flight: bool = True) -> float:
        """Return the deviation of the conserved sum, relative to the models.

        Args:
            in_flight: whether deltas in the inboxes count.
        """
        algorithms = self.simulator.algorithms
        if in_flight:
            mass = total_mass(algorithms, self.simulator.network.memory)
        else:
            mass = np.sum([algorithm.mass() for algorithm in algorithms], 0, dtype=np.float64)
        return self.simulator.oracle.error(mass, self.simulator.models)

    def step(self) -> None:
        """Make one step of every rank, without a gradient, at the same moment."""
        for algorithm, local in zip(self.simulator.algorithms, self.simulator.locals, strict=True):
            local.gradient[:] = 0
            local.local_step += 1
            for _ in algorithm.step(local):
                raise AssertionError("an asynchronous algorithm has waited")

    def end(self, *, flush: bool) -> None:
        """End as `Decentralized` does: the others absorb once more when all have finished.

        Args:
            flush: whether a rank waits before it says so until all of its own has been delivered.
        """
        simulator = self.simulator
        for algorithm in simulator.algorithms:
            assert not list(algorithm.finalize())
        while flush and not all(endpoint.is_flushed() for endpoint in simulator.endpoints):
            assert simulator.clock.advance()
        for algorithm, local in zip(simulator.algorithms, simulator.locals, strict=True):
            algorithm.absorb(local.local_step)


def simulate_late(*overrides: str, **options: Any) -> dict[str, float]:
    """Run a simulation, and return what is found: see `LateSimulation`."""
    return LateSimulation(*overrides, **options).run()
