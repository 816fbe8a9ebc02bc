"""The endpoint on a virtual clock: the same protocols as on windows, and time that is a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import (
    Endpoint,
    ExchangeRequest,
    ReadRequest,
    Request,
    SendBuffer,
    claim_and_reserve,
)
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.virtual.network import Network, VirtualCondition

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
        where = network.word_map
        self.publication = Publication(network, network, where, rank, self.counters, held)
        self.inbox = Inbox(network, network, where, rank, self.counters)
        self._in_flight = 0
        self._rounds = 0

    def neighbours(self) -> Sequence[int]:
        return self._network.topology.neighbours(self.rank)

    def begin_exchange(self, candidates: Sequence[int]) -> ExchangeRequest:
        pairing = ExchangeRequest()
        if self._network.latency or self._network.bandwidth:
            self._network.clock.after(
                self._network.latency, lambda: self._try_candidates(pairing, list(candidates))
            )
            return pairing
        for rank in candidates:
            if self._try_partner(pairing, rank):
                return pairing
            pairing.failed_attempts += 1
        pairing.is_settled = True
        return pairing

    def _try_partner(self, pairing: ExchangeRequest, rank: int) -> bool:
        met = claim_and_reserve(self.publication, self.inbox, rank)
        if met is None:
            return False
        claim, reservation = met
        self.counters.bytes_received += self._network.layout.nbytes
        theirs, reply = self._network.view(rank, claim.slot), self.inbox.view_of(reservation)
        pairing.settle(claim, reservation, theirs, reply)
        return True

    def _try_candidates(self, pairing: ExchangeRequest, candidates: list[int]) -> None:
        """The question has arrived at the first candidate: its answer, and perhaps the next question."""
        network = self._network
        found = ExchangeRequest()
        if self._try_partner(found, candidates.pop(0)):
            found.failed_attempts = pairing.failed_attempts
            network.clock.after(network.transfer, lambda: vars(pairing).update(vars(found)))
        elif candidates:
            pairing.failed_attempts += 1
            network.clock.after(
                2 * network.latency, lambda: self._try_candidates(pairing, candidates)
            )
        else:
            pairing.failed_attempts += 1
            network.clock.after(network.latency, lambda: setattr(pairing, "is_settled", True))

    def is_local(self, rank: int) -> bool:
        return not (self._network.latency or self._network.bandwidth)

    def commit_exchange(self, pairing: ExchangeRequest) -> None:
        claim, reservation, reply = pairing.claim, pairing.reservation, pairing.partner_delta
        assert claim is not None and reservation is not None and reply is not None

        def deliver() -> None:
            self.inbox.send(reservation, reply)
            self.publication.release(claim)

        self._after_transfer(deliver)

    def abort_exchange(self, pairing: ExchangeRequest) -> None:
        if pairing.claim is None or pairing.reservation is None:
            return
        self.inbox.cancel(pairing.reservation)
        self.publication.release(pairing.claim)

    def _after_transfer(self, event: Callable[[], None]) -> None:
        if not self._network.transfer:
            event()
            return
        self._in_flight += 1

        def arrive() -> None:
            self._in_flight -= 1
            event()

        self._network.clock.after(self._network.transfer, arrive)

    def is_flushed(self) -> bool:
        return self._in_flight == 0

    def time_ns(self) -> int:
        return int(self._network.clock.now * 1e9)

    def read(self, rank: int, version: int | None = None) -> ReadRequest:
        reading = _VirtualRead(rank)
        network = self._network
        if version is not None:
            self._await(reading, version)
        elif network.transfer:
            network.clock.after(network.latency, lambda: self._copy(reading))
        else:
            self._copy(reading)
        return reading

    def _copy(self, reading: _VirtualRead) -> None:
        network = self._network
        copy = Message(np.empty(network.layout.nbytes, np.uint8), network.layout)
        if self.publication.read(reading.rank, copy):
            reading.message = copy
            self.counters.bytes_received += network.layout.nbytes
        self._settle(reading)

    def _await(self, reading: _VirtualRead, version: int) -> None:
        slot = self.publication.locate(reading.rank, version)
        if slot is None:
            there = VirtualCondition(
                self._network,
                lambda: self.publication.locate(reading.rank, version) is not None,
                (reading.rank,),
            )
            there.notify(lambda: self._await(reading, version))
            return
        reading.message = self._network.view(reading.rank, slot)
        self.counters.bytes_received += self._network.layout.nbytes
        self._settle(reading)

    def _settle(self, reading: _VirtualRead) -> None:
        if self._network.transfer:
            self._network.clock.after(self._network.transfer, reading.settle)
        else:
            reading.settle()

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        reservation = self.inbox.reserve(rank)
        if reservation is None:
            return None
        message = self.inbox.view_of(reservation)
        assert message is not None, "virtual slots are in place"
        return SendBuffer(rank, message, reservation)

    def send(self, posting: SendBuffer) -> None:
        reservation = posting.reservation
        assert reservation is not None
        self._after_transfer(lambda: self.inbox.send(reservation, posting.message))

    def until(self, condition: Callable[[], bool], ranks: Iterable[int] | None = None) -> Request:
        return VirtualCondition(
            self._network, condition, (self.rank,) if ranks is None else tuple(ranks)
        )

    def gradients(self) -> int:
        return self._network.gradients

    def gradients_of(self, rank: int) -> int:
        return self._network.counts[rank]

    def report_gradients(self, gradients: int) -> None:
        self._network.gradients += gradients - self._network.counts[self.rank]
        self._network.counts[self.rank] = gradients

    def allreduce(self, array: np.ndarray) -> Request:
        self._rounds += 1
        return self._network.join(self._rounds, array)

    def total_counters(self) -> Counters:
        return self.counters


class _VirtualRead(ReadRequest):
    """A reading that wakes whoever waits for it."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._wake: Callable[[], None] | None = None

    def settle(self) -> None:
        """It has ended."""
        self.is_settled = True
        if self._wake is not None:
            self._wake()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when it is settled, which it is not yet."""
        self._wake = wake
