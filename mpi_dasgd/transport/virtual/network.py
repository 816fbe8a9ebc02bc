"""The network between virtual ranks: what takes time, and who is woken when it is over.

One thread, one seed: a simulation repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.control_words import READY
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.memory import SharedMemory

__all__ = ["Delays", "FixedDelays", "Network", "VirtualAllreduce", "VirtualCondition"]

_POLL_INTERVAL = 1e-3  # virtual time between two tests of a request without callbacks


class Delays(Protocol):
    """How long operations on the network take, in virtual time."""

    @property
    def instant(self) -> bool:
        """Whether nothing takes any time."""

    def word_delay(self) -> float:
        """Return the one-way time of an operation on a control word."""

    def message_delay(self, now: float) -> float:
        """Return the time that a message sent at `now` takes."""


@dataclass(frozen=True)
class FixedDelays:
    """The same delays for all operations.

    Args:
        latency: one-way time of an operation on a control word.
        transfer: time that a message takes.
    """

    latency: float
    transfer: float

    @property
    def instant(self) -> bool:
        return not self.transfer

    def word_delay(self) -> float:
        return self.latency

    def message_delay(self, now: float) -> float:
        return self.transfer


@runtime_checkable
class _CallbackRequest(Protocol):
    """A pending operation that calls back its waiter when it completes."""

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` on completion, not before this call returns."""


class Network:
    """All that virtual ranks have in common: the clock, the memory and the delays.

    Args:
        clock: virtual time.
        memory: control words and payload slots of all ranks.
        topology: graph of the ranks that may communicate.
        latency: one-way time of an operation on a control word.
        bandwidth: bytes per unit of time; 0 for no limit.

    Attributes:
        gradients: gradients that all ranks have computed.
        gradient_counts: the same per rank.
        servers: for ranks that compute no gradients, called when a message has arrived.
    """

    def __init__(
        self,
        clock: Clock,
        memory: SharedMemory,
        topology: Topology,
        *,
        latency: float = 0.0,
        bandwidth: float = 0.0,
    ) -> None:
        self.clock = clock
        self.memory = memory
        self.topology = topology
        transfer = latency + (memory.layout.nbytes / bandwidth if bandwidth else 0.0)
        self.delays = FixedDelays(latency, transfer)
        self.gradients = 0
        self.gradient_counts = [0] * topology.size
        self.servers: dict[int, Callable[[], None]] = {}
        self._allreduces: dict[int, VirtualAllreduce] = {}
        self._watchers: dict[int, dict[VirtualCondition, None]] = {}
        memory.on_write = self._on_write

    def _on_write(self, rank: int, index: int, value: int) -> None:
        if self._watchers and rank in self._watchers:
            for watcher in self._watchers[rank]:
                self.clock.after(0.0, watcher.on_change)
        if rank in self.servers and value & 3 == READY and index in self.memory.word_map.inbox:
            self.servers[rank]()

    def watch(self, watcher: VirtualCondition, ranks: Iterable[int]) -> None:
        """Have `watcher` test its condition whenever a control word of one of `ranks` changes."""
        for rank in ranks:
            self._watchers.setdefault(rank, {})[watcher] = None

    def unwatch(self, watcher: VirtualCondition, ranks: Iterable[int]) -> None:
        """Undo `watch`."""
        for rank in ranks:
            watchers = self._watchers.get(rank, {})
            watchers.pop(watcher, None)
            if not watchers:
                self._watchers.pop(rank, None)

    def notify(self, request: Request, wake: Callable[[], None]) -> None:
        """Call `wake` once `request` is complete, not before this call returns."""
        if isinstance(request, _CallbackRequest):
            request.notify(wake)
        elif request.test():
            self.clock.after(0.0, wake)
        else:
            interval = self.delays.latency or _POLL_INTERVAL
            self.clock.after(interval, lambda: self.notify(request, wake))

    def join_allreduce(self, number: int, array: np.ndarray) -> VirtualAllreduce:
        """Contribute `array` to allreduce `number` of all ranks; it receives the sum."""
        allreduce = self._allreduces.setdefault(number, VirtualAllreduce(self))
        allreduce.join(array)
        if allreduce.missing_ranks == 0:
            del self._allreduces[number]
        return allreduce


class VirtualCondition:
    """A request that is complete when a condition on control words holds.

    Args:
        network: network of the ranks.
        condition: depends on control words of `ranks` only.
        ranks: ranks whose control words matter.
    """

    def __init__(
        self, network: Network, condition: Callable[[], bool], ranks: tuple[int, ...]
    ) -> None:
        self._network = network
        self._condition = condition
        self._ranks = ranks
        self._wake: Callable[[], None] | None = None

    def test(self) -> bool:
        return self._condition()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the condition holds, not before this call returns."""
        self._wake = wake
        self._network.watch(self, self._ranks)
        if self._condition():
            self._network.clock.after(0.0, self.on_change)

    def on_change(self) -> None:
        """Test the condition after a control word has changed, and wake the waiter if it holds."""
        wake = self._wake
        if wake is not None and self._condition():
            self._wake = None
            self._network.unwatch(self, self._ranks)
            wake()


class VirtualAllreduce:
    """An allreduce that is complete one message delay after the last rank has joined it.

    Attributes:
        missing_ranks: number of ranks that have not joined yet.
        complete: whether the arrays hold the sum.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._arrays: list[np.ndarray] = []
        self.missing_ranks = network.topology.size
        self.complete = False
        self._wakes: list[Callable[[], None]] = []

    def join(self, array: np.ndarray) -> None:
        """Contribute `array`; it is overwritten with the sum."""
        self._arrays.append(array)
        self.missing_ranks -= 1
        if self.missing_ranks == 0:
            self._network.clock.after(self._network.delays.transfer, self._finish)

    def _finish(self) -> None:
        total = np.sum(self._arrays, axis=0)
        for array in self._arrays:
            array[:] = total
        self.complete = True
        for wake in self._wakes:
            wake()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the sum is complete, which it is not yet."""
        self._wakes.append(wake)

    def test(self) -> bool:
        return self.complete
