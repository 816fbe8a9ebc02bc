"""Ranks of other nodes: the progress thread talks to them, and the compute thread never waits."""

from __future__ import annotations

import enum
import functools
import time
from collections.abc import Sequence

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.endpoint import ExchangeRequest, ReadRequest, SendBuffer, claim_and_reserve
from mpi_dasgd.transport.inbox import Reservation
from mpi_dasgd.transport.membership import Membership
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.publication import Claim
from mpi_dasgd.transport.rma.progress_context import ProgressContext
from mpi_dasgd.transport.rma.progress_engine import RETRY_SECONDS, ProgressEngine

__all__ = ["RemotePeers"]


class _ReadResult(enum.Enum):
    """What came of one attempt to read a publication."""

    READY = enum.auto()
    NOT_YET = enum.auto()  # the version may still be published: try again
    UNAVAILABLE = enum.auto()


class RemotePeers:
    """Operations on the ranks of other nodes. Its methods are called by the compute thread.

    Args:
        slots: payload slots.
        membership: where ranks that cannot be reached are marked as dead.
        engine: runs the operations in the progress thread.
    """

    def __init__(
        self,
        slots: Slots,
        membership: Membership,
        engine: ProgressEngine,
    ) -> None:
        self._slots = slots
        self._membership = membership
        self._engine = engine
        self._outgoing: dict[int, Message] = {}  # receiver to message, while in flight
        self._unused_buffers: list[Message] = []

    def check(self, stall_timeout: float) -> None:
        """Replace the progress thread if one call has blocked it for over `stall_timeout` seconds.

        Raises:
            BaseException: whatever failed in the progress thread.
        """
        for rank in tuple(self._outgoing):
            if self._membership.is_unreachable(rank):
                self._outgoing.pop(rank, None)
        self._engine.check(stall_timeout)

    def begin_exchange(self, request: ExchangeRequest, candidates: Sequence[int]) -> None:
        """Try to claim one of `candidates` as partner."""
        self._engine.submit(functools.partial(self._begin_exchange, request, candidates))

    def _begin_exchange(
        self, request: ExchangeRequest, candidates: Sequence[int], context: ProgressContext
    ) -> None:
        if not context.begin_request(functools.partial(setattr, request, "is_settled", True)):
            return self.begin_exchange(request, candidates)
        claimed, failed = None, 0
        partner_model, partner_delta = context.buffer("model"), context.buffer("delta")
        for rank in context.iterate_peers(candidates):
            if not self._membership.is_unreachable(rank) and rank not in context.quarantined:
                with self._membership.mark_dead_on_failure(rank):
                    claimed = claim_and_reserve(context.publication, context.inbox, rank)
                    if claimed is not None:
                        self._slots.get(rank, claimed[0].slot, partner_model)
                        context.counters.bytes_received += partner_model.layout.nbytes
                        break
                claimed = None
            failed += 1
        with context.publish_result() as current:
            if current:
                request.failed_attempts += failed
                if claimed is None:
                    request.is_settled = True
                else:
                    request.settle(*claimed, partner_model, partner_delta)
        if claimed is not None and not current:  # no other thread knows of the claim
            with self._membership.mark_dead_on_failure(claimed[0].rank):
                _release(*claimed, context)

    def commit_exchange(self, request: ExchangeRequest) -> None:
        """Deliver the partner's delta, then release its publication."""
        claim, reservation, delta = request.claim, request.reservation, request.partner_delta
        assert claim is not None and reservation is not None and delta is not None

        def deliver(context: ProgressContext) -> None:
            context.inbox.send(reservation, delta)
            context.publication.release(claim)

        self._engine.submit_for(claim.rank, deliver)

    def abort_exchange(self, request: ExchangeRequest) -> None:
        """Free what a settled request has claimed."""
        claim, reservation = request.claim, request.reservation
        assert claim is not None and reservation is not None
        self._engine.submit_for(claim.rank, functools.partial(_release, claim, reservation))

    def read(self, rank: int, version: int | None) -> ReadRequest:
        """Ask for a publication; only a given version of a quarantined rank is waited for."""
        request = ReadRequest(rank)
        self._engine.submit(functools.partial(self._read, request, version))
        return request

    def _read(self, request: ReadRequest, version: int | None, context: ProgressContext) -> None:
        retry = functools.partial(
            self._engine.submit, functools.partial(self._read, request, version)
        )
        give_up = functools.partial(setattr, request, "is_settled", True)
        if not context.begin_request(give_up if version is None else retry):
            return retry()
        copy = context.buffer("copy")
        result = self._try_read(request.rank, version, copy, context)
        with context.publish_result() as current:
            if current and result is not _ReadResult.NOT_YET:
                if result is _ReadResult.READY:
                    request.message = copy
                    context.counters.bytes_received += copy.layout.nbytes
                request.is_settled = True
        if current and result is _ReadResult.NOT_YET:
            time.sleep(RETRY_SECONDS)
            retry()

    def _try_read(
        self, rank: int, version: int | None, out: Message, context: ProgressContext
    ) -> _ReadResult:
        """Copy the newest or the given version of `rank` to `out`, if possible now."""
        if self._membership.is_unreachable(rank):
            return _ReadResult.UNAVAILABLE
        if rank in context.quarantined:
            return _ReadResult.UNAVAILABLE if version is None else _ReadResult.NOT_YET
        if not context.switch_to(rank):
            return _ReadResult.UNAVAILABLE
        with self._membership.mark_dead_on_failure(rank):
            if version is None:
                whole = context.publication.read(rank, out)
                return _ReadResult.READY if whole else _ReadResult.UNAVAILABLE
            slot = context.publication.locate(rank, version)
            if slot is None:
                return _ReadResult.NOT_YET
            self._slots.get(rank, slot, out)
            return _ReadResult.READY
        return _ReadResult.UNAVAILABLE  # the rank is dead

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        """Return a staging buffer; None if `rank` is quarantined or has a message in flight."""
        if not self._membership.is_unreachable(rank) and rank in {
            *self._outgoing,
            *self._engine.quarantined,
        }:
            return None
        layout = self._slots.layout
        if self._unused_buffers:
            return SendBuffer(rank, self._unused_buffers.pop())
        return SendBuffer(rank, Message(np.empty(layout.nbytes, np.uint8), layout))

    def send(self, buffer: SendBuffer) -> None:
        """Send a buffer; the progress thread retries until the receiver's inbox has a free slot."""
        self._outgoing[buffer.rank] = buffer.message
        self._engine.submit_for(buffer.rank, functools.partial(self._send, buffer))

    def _send(self, buffer: SendBuffer, context: ProgressContext) -> None:
        rank = buffer.rank
        reservation = context.inbox.reserve(rank)
        if reservation is None:
            time.sleep(RETRY_SECONDS)
            self._engine.submit_for(rank, functools.partial(self._send, buffer))
            return
        context.inbox.send(reservation, buffer.message)
        self._unused_buffers.append(buffer.message)
        self._outgoing.pop(rank, None)

    def is_flushed(self) -> bool:
        """Return whether all requests are done, except those to ranks that are gone."""
        pending = {*self._outgoing, *self._engine.quarantined}
        return self._engine.idle and all(map(self._membership.is_unreachable, pending))


def _release(claim: Claim, reservation: Reservation, context: ProgressContext) -> None:
    """Free a claimed publication and a reserved slot of an inbox."""
    context.inbox.cancel(reservation)
    context.publication.give_back(claim)
