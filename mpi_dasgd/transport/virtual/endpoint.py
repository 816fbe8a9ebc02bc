"""The endpoint on a virtual clock: the same protocols as on windows, and time that is a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import Endpoint, Pairing, Pending, Posting, Reading, meet
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.virtual.network import Network, Until

__all__ = ["VirtualEndpoint"]


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
            there = Until(
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
        return Until(self._network, condition, (self.rank,) if ranks is None else tuple(ranks))

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
