"""What virtual ranks share: a clock, and a network whose shared memory is plain lists.

One thread, one seed: a simulation repeats bit for bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.control_words import READY, WordMap
from mpi_dasgd.transport.endpoint import Request

__all__ = ["Clock", "Network", "VirtualAllreduce", "VirtualCondition"]


@runtime_checkable
class _VirtualRequest(Protocol):
    """What is pending and tells whoever waits that it is done."""

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` once it is done; not before this call returns."""


class Clock:
    """Virtual time, and what is to happen when. Events of the same time happen in their order of entry."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._entered = 0

    def after(self, delay: float, event: Callable[[], None]) -> None:
        """Have `event` happen `delay` from now."""
        heapq.heappush(self._heap, (self.now + delay, self._entered, event))
        self._entered += 1

    def advance(self) -> bool:
        """Let the next event happen; return False if there is none."""
        if not self._heap:
            return False
        self.now, _, event = heapq.heappop(self._heap)
        self.events += 1
        event()
        return True


class Network:
    """What all virtual ranks share: words, slots, and the time that messages take.

    Args:
        clock: virtual time.
        layout: of every message.
        topology: who may talk to whom.
        publication_slots, inbox_slots: number of slots a rank.
        latency: time of one word operation or message on its way.
        bandwidth: bytes per unit of time; 0 for no limit.
    """

    def __init__(
        self,
        clock: Clock,
        layout: Layout,
        topology: Topology,
        *,
        publication_slots: int = 4,
        inbox_slots: int = 4,
        latency: float = 0.0,
        bandwidth: float = 0.0,
    ) -> None:
        self.clock = clock
        self.layout = layout
        self.topology = topology
        self.latency = latency
        self.bandwidth = bandwidth
        self.word_map = WordMap(publication_slots, inbox_slots)
        self._words = [[0] * self.word_map.count for _ in range(topology.size)]
        self._count = publication_slots + inbox_slots
        self._messages: dict[int, Message] = {}
        self._rounds: dict[int, VirtualAllreduce] = {}
        self._watchers: dict[int, dict[VirtualCondition, None]] = {}
        self.servers: dict[int, Callable[[], None]] = {}  # called when a message has arrived
        self.counts = [0] * topology.size
        self.gradients = 0

    @property
    def transfer(self) -> float:
        """Time that one message takes."""
        return self.latency + (self.layout.nbytes / self.bandwidth if self.bandwidth else 0.0)

    def read(self, rank: int, index: int) -> int:
        return self._words[rank][index]

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        words = self._words[rank]
        if words[index] != expected:
            return False
        words[index] = new
        if self._watchers and rank in self._watchers:
            for watcher in self._watchers[rank]:
                self.clock.after(0.0, watcher.on_change)
        if rank in self.servers and new & 3 == READY and index in self.word_map.inbox:
            self.servers[rank]()
        return True

    def watch(self, watcher: VirtualCondition, ranks: Iterable[int]) -> None:
        """Have `watcher` look whenever a word of one of `ranks` changes."""
        for rank in ranks:
            self._watchers.setdefault(rank, {})[watcher] = None

    def unwatch(self, watcher: VirtualCondition, ranks: Iterable[int]) -> None:
        for rank in ranks:
            watchers = self._watchers.get(rank, {})
            watchers.pop(watcher, None)
            if not watchers:
                self._watchers.pop(rank, None)

    def notify(self, pending: Request, wake: Callable[[], None]) -> None:
        """Call `wake` once `pending` is done; not before this call returns."""
        if isinstance(pending, _VirtualRequest):
            pending.notify(wake)
        elif pending.test():
            self.clock.after(0.0, wake)
        else:
            self.clock.after(self.latency or 1e-3, lambda: self.notify(pending, wake))

    def view(self, rank: int, index: int) -> Message:
        key = rank * self._count + index
        message = self._messages.get(key)
        if message is None:  # slots that are never used take no memory
            buffer = np.zeros(self.layout.nbytes, np.uint8)
            message = self._messages[key] = Message(buffer, self.layout)
        return message

    def get(self, rank: int, index: int, out: Message) -> None:
        out.buffer[:] = self.view(rank, index).buffer

    def put(self, rank: int, index: int, message: Message) -> None:
        self.view(rank, index).buffer[:] = message.buffer

    def fence(self) -> None:
        """Nothing to order: there is one thread."""

    def join(self, number: int, array: np.ndarray) -> VirtualAllreduce:
        """Enter sum `number` of all ranks."""
        total = self._rounds.setdefault(number, VirtualAllreduce(self))
        total.enter(array)
        if total.missing == 0:
            del self._rounds[number]
        return total


class VirtualCondition:
    """Done when a condition on control words holds."""

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
        """Call `wake` when the condition holds; not before this call returns."""
        self._wake = wake
        self._network.watch(self, self._ranks)
        if self._condition():
            self._network.clock.after(0.0, self.on_change)

    def on_change(self) -> None:
        """Some word has changed."""
        wake = self._wake
        if wake is not None and self._condition():
            self._wake = None
            self._network.unwatch(self, self._ranks)
            wake()


class VirtualAllreduce:
    """A sum that is there one transfer after the last rank has come."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._arrays: list[np.ndarray] = []
        self.missing = network.topology.size
        self.complete = False
        self._waiting: list[Callable[[], None]] = []

    def enter(self, array: np.ndarray) -> None:
        self._arrays.append(array)
        self.missing -= 1
        if self.missing == 0:
            self._network.clock.after(self._network.transfer, self._finish)

    def _finish(self) -> None:
        total = np.sum(self._arrays, axis=0)
        for array in self._arrays:
            array[:] = total
        self.complete = True
        for wake in self._waiting:
            wake()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the sum is there, which it is not yet."""
        self._waiting.append(wake)

    def test(self) -> bool:
        return self.complete
