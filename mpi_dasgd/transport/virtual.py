"""The endpoint on a virtual clock: the same protocols, shared memory that is plain lists, and time that
is a number. One thread, one seed: a simulation repeats bit for bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import Endpoint, Pairing, Pending, meet
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.words import WordMap

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
        self._messages: dict[int, list[Message]] = {}
        self._rounds: dict[int, _Allreduce] = {}

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
        return True

    def at(self, rank: int, index: int) -> Message:
        messages = self._messages.get(rank)
        if messages is None:
            buffer = np.zeros((self._count, self.layout.nbytes), np.uint8)
            messages = self._messages[rank] = [Message(part, self.layout) for part in buffer]
        return messages[index]

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

    def allreduce(self, array: np.ndarray) -> Pending:
        self._rounds += 1
        return self._network.join(self._rounds, array)

    def totals(self) -> Counters:
        return self.counters


class _Allreduce:
    """A sum that is there one transfer after the last rank has come."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._arrays: list[np.ndarray] = []
        self.missing = network.topology.size
        self.complete = False
        self.waiting: list[Callable[[], None]] = []

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
        for wake in self.waiting:
            wake()

    def done(self) -> bool:
        return self.complete
