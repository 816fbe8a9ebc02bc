"""The endpoint on a virtual clock: the same protocols, shared memory that is plain lists, and time that
is a number. One thread, one seed: a simulation repeats bit for bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import Endpoint, Pairing, Pending, Posting, Reading, meet
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.words import READY, WordMap

__all__ = ["Clock", "Network", "VirtualEndpoint"]


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
        self.where = WordMap(publication_slots, inbox_slots)
        self._words = [[0] * self.where.count for _ in range(topology.size)]
        self._count = publication_slots + inbox_slots
        self._messages: dict[int, Message] = {}
        self._rounds: dict[int, _Allreduce] = {}
        self._watchers: dict[int, dict[_Until, None]] = {}
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
                self.clock.after(0.0, watcher.look)
        if rank in self.servers and new & 3 == READY and index in self.where.inbox:
            self.servers[rank]()
        return True

    def watch(self, watcher: _Until, ranks: Iterable[int]) -> None:
        """Have `watcher` look whenever a word of one of `ranks` changes."""
        for rank in ranks:
            self._watchers.setdefault(rank, {})[watcher] = None

    def unwatch(self, watcher: _Until, ranks: Iterable[int]) -> None:
        for rank in ranks:
            watchers = self._watchers.get(rank, {})
            watchers.pop(watcher, None)
            if not watchers:
                self._watchers.pop(rank, None)

    def notify(self, pending: Pending, wake: Callable[[], None]) -> None:
        """Call `wake` once `pending` is done; not before this call returns."""
        if isinstance(pending, _Until | _Allreduce | _Reading):
            pending.notify(wake)
        elif pending.done():
            self.clock.after(0.0, wake)
        else:
            self.clock.after(self.latency or 1e-3, lambda: self.notify(pending, wake))

    def at(self, rank: int, index: int) -> Message:
        key = rank * self._count + index
        message = self._messages.get(key)
        if message is None:  # slots that are never used take no memory
            buffer = np.zeros(self.layout.nbytes, np.uint8)
            message = self._messages[key] = Message(buffer, self.layout)
        return message

    def get(self, rank: int, index: int, out: Message) -> None:
        out.buffer[:] = self.at(rank, index).buffer

    def put(self, rank: int, index: int, message: Message) -> None:
        self.at(rank, index).buffer[:] = message.buffer

    def sync(self) -> None:
        """Nothing to order: there is one thread."""

    def join(self, number: int, array: np.ndarray) -> _Allreduce:
        """Enter sum `number` of all ranks."""
        total = self._rounds.setdefault(number, _Allreduce(self))
        total.enter(array)
        if total.missing == 0:
            del self._rounds[number]
        return total


class VirtualEndpoint(Endpoint):
    """One virtual rank's transport.

    Args:
        network: what all ranks share.
        rank: this rank.
        held: see `Publication`.
    """

    def __init__(self, network: Network, rank: int, held: int = 2) -> None:
        self.rank, self.size = rank, network.topology.size
        self._network = network
        self.topology = network.topology
        self.counters = Counters()
        where = network.where
        self.publication = Publication(network, network, where, rank, self.counters, held)
        self.inbox = Inbox(network, network, where, rank, self.counters)
        self._on_the_way = 0
        self._rounds = 0

    def neighbours(self) -> Sequence[int]:
        return self._network.topology.neighbours(self.rank)

    def pair(self, candidates: Sequence[int]) -> Pairing:
        pairing = Pairing()
        if self._network.latency or self._network.bandwidth:
            self._network.clock.after(
                self._network.latency, lambda: self._ask(pairing, list(candidates))
            )
            return pairing
        for rank in candidates:
            if self._meet(pairing, rank):
                return pairing
            pairing.failed += 1
        pairing.settled = True
        return pairing

    def _meet(self, pairing: Pairing, rank: int) -> bool:
        met = meet(self.publication, self.inbox, rank)
        if met is None:
            return False
        claim, reservation = met
        self.counters.bytes_received += self._network.layout.nbytes
        theirs, reply = self._network.at(rank, claim.slot), self.inbox.place(reservation)
        pairing.settle(claim, reservation, theirs, reply)
        return True

    def _ask(self, pairing: Pairing, candidates: list[int]) -> None:
        """The question has arrived at the first candidate: its answer, and perhaps the next question."""
        network = self._network
        found = Pairing()
        if self._meet(found, candidates.pop(0)):
            found.failed = pairing.failed
            network.clock.after(network.transfer, lambda: vars(pairing).update(vars(found)))
        elif candidates:
            pairing.failed += 1
            network.clock.after(2 * network.latency, lambda: self._ask(pairing, candidates))
        else:
            pairing.failed += 1
            network.clock.after(network.latency, lambda: setattr(pairing, "settled", True))

    def immediate(self, rank: int) -> bool:
        return not (self._network.latency or self._network.bandwidth)

    def complete(self, pairing: Pairing) -> None:
        claim, reservation, reply = pairing.claim, pairing.reservation, pairing.reply
        assert claim is not None and reservation is not None and reply is not None

        def deliver() -> None:
            self.inbox.send(reservation, reply)
            self.publication.release(claim)

        self._later(deliver)

    def abandon(self, pairing: Pairing) -> None:
        if pairing.claim is None or pairing.reservation is None:
            return
        self.inbox.cancel(pairing.reservation)
        self.publication.release(pairing.claim)

    def _later(self, event: Callable[[], None]) -> None:
        if not self._network.transfer:
            event()
            return
        self._on_the_way += 1

        def arrive() -> None:
            self._on_the_way -= 1
            event()

        self._network.clock.after(self._network.transfer, arrive)

    def delivered(self) -> bool:
        return self._on_the_way == 0

    def time_ns(self) -> int:
        return int(self._network.clock.now * 1e9)

    def read(self, rank: int, version: int | None = None) -> Reading:
        reading = _Reading(rank)
        network = self._network
        if version is not None:
            self._await(reading, version)
        elif network.transfer:
            network.clock.after(network.latency, lambda: self._copy(reading))
        else:
            self._copy(reading)
        return reading

    def _copy(self, reading: _Reading) -> None:
        network = self._network
        copy = Message(np.empty(network.layout.nbytes, np.uint8), network.layout)
        if self.publication.read(reading.rank, copy):
            reading.message = copy
            self.counters.bytes_received += network.layout.nbytes
        self._settle(reading)

    def _await(self, reading: _Reading, version: int) -> None:
        slot = self.publication.locate(reading.rank, version)
        if slot is None:
            there = _Until(
                self._network,
                lambda: self.publication.locate(reading.rank, version) is not None,
                (reading.rank,),
            )
            there.notify(lambda: self._await(reading, version))
            return
        reading.message = self._network.at(reading.rank, slot)
        self.counters.bytes_received += self._network.layout.nbytes
        self._settle(reading)

    def _settle(self, reading: _Reading) -> None:
        if self._network.transfer:
            self._network.clock.after(self._network.transfer, reading.settle)
        else:
            reading.settle()

    def post(self, rank: int) -> Posting | None:
        reservation = self.inbox.reserve(rank)
        if reservation is None:
            return None
        message = self.inbox.place(reservation)
        assert message is not None, "virtual slots are in place"
        return Posting(rank, message, reservation)

    def deliver(self, posting: Posting) -> None:
        reservation = posting.reservation
        assert reservation is not None
        self._later(lambda: self.inbox.send(reservation, posting.message))

    def until(self, condition: Callable[[], bool], ranks: Iterable[int] | None = None) -> Pending:
        return _Until(self._network, condition, (self.rank,) if ranks is None else tuple(ranks))

    def gradients(self) -> int:
        return self._network.gradients

    def gradients_of(self, rank: int) -> int:
        return self._network.counts[rank]

    def count(self, gradients: int) -> None:
        self._network.gradients += gradients - self._network.counts[self.rank]
        self._network.counts[self.rank] = gradients

    def allreduce(self, array: np.ndarray) -> Pending:
        self._rounds += 1
        return self._network.join(self._rounds, array)

    def totals(self) -> Counters:
        return self.counters


class _Reading(Reading):
    """A reading that wakes whoever waits for it."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._wake: Callable[[], None] | None = None

    def settle(self) -> None:
        """It has ended."""
        self.settled = True
        if self._wake is not None:
            self._wake()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when it is settled, which it is not yet."""
        self._wake = wake


class _Until:
    """Done when a condition on control words holds."""

    def __init__(
        self, network: Network, condition: Callable[[], bool], ranks: tuple[int, ...]
    ) -> None:
        self._network = network
        self._condition = condition
        self._ranks = ranks
        self._wake: Callable[[], None] | None = None

    def done(self) -> bool:
        return self._condition()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the condition holds; not before this call returns."""
        self._wake = wake
        self._network.watch(self, self._ranks)
        if self._condition():
            self._network.clock.after(0.0, self.look)

    def look(self) -> None:
        """Some word has changed."""
        wake = self._wake
        if wake is not None and self._condition():
            self._wake = None
            self._network.unwatch(self, self._ranks)
            wake()


class _Allreduce:
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

    def done(self) -> bool:
        return self.complete
