"""The endpoint on a virtual clock: the same protocols as on windows, and time that is a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.device.run_ahead import RunAhead
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
from mpi_dasgd.transport.release import Immediate, Release
from mpi_dasgd.transport.virtual.network import Delays, Network, VirtualCondition

__all__ = ["VirtualEndpoint"]


class VirtualEndpoint(Endpoint):
    """One virtual rank's transport.

    Args:
        network: clock, memory and delays of all ranks.
        rank: this rank.
        delays: delays of this rank's operations; None: those of the network.
        device: device of this rank.
        release: makes the swaps that give memory away; None: at once.
    """

    def __init__(
        self,
        network: Network,
        rank: int,
        delays: Delays | None = None,
        *,
        device: Device = HOST,
        release: Release | None = None,
    ) -> None:
        self.rank, self.size = rank, network.topology.size
        self.topology = network.topology
        self.counters = Counters()
        memory = network.memory
        self.release = Immediate(memory) if release is None else release
        self.run_ahead = RunAhead(device)
        shared = memory, memory, memory.word_map, rank, self.counters
        self.publication = Publication(*shared, release=self.release)
        self.inbox = Inbox(*shared, release=self.release)
        self._network = network
        self._clock = network.clock
        self._memory = memory
        self._delays = network.delays if delays is None else delays
        self._in_flight = 0
        self._allreduces = 0

    def neighbours(self) -> Sequence[int]:
        return self.topology.neighbours(self.rank)

    def begin_exchange(self, candidates: Sequence[int]) -> ExchangeRequest:
        request = ExchangeRequest()
        if not self._delays.instant:
            self._clock.after(
                self._delays.word_delay(), lambda: self._try_candidates(request, list(candidates))
            )
            return request
        for rank in candidates:
            if self._try_partner(request, rank):
                return request
            request.failed_attempts += 1
        request.is_settled = True
        return request

    def _try_partner(self, request: ExchangeRequest, rank: int) -> bool:
        claimed = claim_and_reserve(self.publication, self.inbox, rank)
        if claimed is None:
            return False
        claim, reservation = claimed
        self.counters.bytes_received += self._memory.layout.nbytes
        partner_model = self._memory.view(rank, claim.slot)
        request.settle(claim, reservation, partner_model, self.inbox.view_of(reservation))
        return True

    def _try_candidates(self, request: ExchangeRequest, candidates: list[int]) -> None:
        """Try the first candidate, whom the request has reached now, and pass on to the next."""
        attempt = ExchangeRequest()
        if self._try_partner(attempt, candidates.pop(0)):
            attempt.failed_attempts = request.failed_attempts
            delay = self._delays.message_delay(self._clock.now)
            self._clock.after(delay, lambda: vars(request).update(vars(attempt)))
        elif candidates:
            request.failed_attempts += 1
            self._clock.after(
                2 * self._delays.word_delay(), lambda: self._try_candidates(request, candidates)
            )
        else:
            request.failed_attempts += 1
            self._clock.after(
                self._delays.word_delay(), lambda: setattr(request, "is_settled", True)
            )

    def is_local(self, rank: int) -> bool:
        return self._delays.instant

    def commit_exchange(self, request: ExchangeRequest) -> None:
        claim, reservation, delta = request.claim, request.reservation, request.partner_delta
        assert claim is not None and reservation is not None and delta is not None

        def deliver() -> None:
            self.inbox.send(reservation, delta)
            self.publication.release(claim)

        self._after_transfer(deliver)

    def abort_exchange(self, request: ExchangeRequest) -> None:
        if request.claim is None or request.reservation is None:
            return
        self.inbox.cancel(request.reservation)
        self.publication.give_back(request.claim)

    def _after_transfer(self, event: Callable[[], None]) -> None:
        """Let `event` happen when a message sent now has arrived."""
        if self._delays.instant:
            event()
            return
        self._in_flight += 1

        def arrive() -> None:
            self._in_flight -= 1
            event()

        self._clock.after(self._delays.message_delay(self._clock.now), arrive)

    def is_flushed(self) -> bool:
        return self._in_flight == 0 and not self.release.is_pending

    def time_ns(self) -> int:
        return int(self._clock.now * 1e9)

    def read(self, rank: int, version: int | None = None) -> ReadRequest:
        request = _VirtualRead(rank)
        if version is not None:
            self._await_version(request, version)
        elif self._delays.instant:
            self._copy_newest(request)
        else:
            self._clock.after(self._delays.word_delay(), lambda: self._copy_newest(request))
        return request

    def _copy_newest(self, request: _VirtualRead) -> None:
        layout = self._memory.layout
        copy = Message(np.empty(layout.nbytes, np.uint8), layout)
        if self.publication.read(request.rank, copy):
            request.message = copy
            self.counters.bytes_received += layout.nbytes
        self._settle(request)

    def _await_version(self, request: _VirtualRead, version: int) -> None:
        slot = self.publication.locate(request.rank, version)
        if slot is None:
            published = VirtualCondition(
                self._network,
                lambda: self.publication.locate(request.rank, version) is not None,
                (request.rank,),
            )
            published.notify(lambda: self._await_version(request, version))
            return
        request.message = self._memory.view(request.rank, slot)
        self.counters.bytes_received += self._memory.layout.nbytes
        self._settle(request)

    def _settle(self, request: _VirtualRead) -> None:
        if self._delays.instant:
            request.settle()
        else:
            self._clock.after(self._delays.message_delay(self._clock.now), request.settle)

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        reservation = self.inbox.reserve(rank)
        if reservation is None:
            return None
        message = self.inbox.view_of(reservation)
        assert message is not None, "virtual slots are in place"
        return SendBuffer(rank, message, reservation)

    def send(self, buffer: SendBuffer) -> None:
        reservation = buffer.reservation
        assert reservation is not None
        self._after_transfer(lambda: self.inbox.send(reservation, buffer.message))

    def wait_until(
        self, condition: Callable[[], bool], ranks: Iterable[int] | None = None
    ) -> Request:
        return VirtualCondition(
            self._network, condition, (self.rank,) if ranks is None else tuple(ranks)
        )

    def gradients(self) -> int:
        return self._network.gradients

    def gradients_of(self, rank: int) -> int:
        return self._network.gradient_counts[rank]

    def report_gradients(self, gradients: int) -> None:
        self._network.gradients += gradients - self._network.gradient_counts[self.rank]
        self._network.gradient_counts[self.rank] = gradients

    def allreduce(self, array: np.ndarray) -> Request:
        self._allreduces += 1
        return self._network.join_allreduce(self._allreduces, array)

    def total_counters(self) -> Counters:
        return self.counters


class _VirtualRead(ReadRequest):
    """A read request that calls back its waiter when it is settled."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._wake: Callable[[], None] | None = None

    def settle(self) -> None:
        """Mark the request as settled, and wake its waiter."""
        self.is_settled = True
        if self._wake is not None:
            self._wake()

    def notify(self, wake: Callable[[], None]) -> None:
        """Call `wake` when the request is settled, which it is not yet."""
        self._wake = wake
