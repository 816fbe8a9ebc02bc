"""Ranks of this node: their slots are in place, so every operation completes at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.endpoint import ExchangeRequest, ReadRequest, SendBuffer, claim_and_reserve
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.rma.peer_views import PeerViews

__all__ = ["NodePeers"]


class NodePeers:
    """Operations on the ranks of this node. Its methods are called by the compute thread.

    Args:
        views: publications and inboxes as the compute thread uses them.
        slots: payload slots.
    """

    def __init__(self, views: PeerViews, slots: Slots) -> None:
        self._publication, self._inbox, self._counters = views
        self._slots = slots
        self._copy: Message | None = None  # of the publication that was read last

    def begin_exchange(self, request: ExchangeRequest, rank: int) -> bool:
        """Try to claim `rank` as partner; return whether the request is settled with it."""
        claimed = claim_and_reserve(self._publication, self._inbox, rank)
        if claimed is None:
            return False
        claim, reservation = claimed
        partner_model = self._slots.view(rank, claim.slot)
        assert partner_model is not None, "slots of this node are in place"
        self._slots.fence()
        self._counters.bytes_received += partner_model.layout.nbytes
        request.settle(claim, reservation, partner_model, self._inbox.view_of(reservation))
        return True

    def commit_exchange(self, request: ExchangeRequest) -> None:
        """Deliver the partner's delta, then release its publication."""
        claim, reservation, delta = request.claim, request.reservation, request.partner_delta
        assert claim is not None and reservation is not None and delta is not None
        self._inbox.send(reservation, delta)
        self._publication.release(claim)

    def abort_exchange(self, request: ExchangeRequest) -> None:
        """Free what a settled request has claimed."""
        assert request.claim is not None and request.reservation is not None
        self._inbox.cancel(request.reservation)
        self._publication.give_back(request.claim)

    def read(self, rank: int, version: int | None) -> ReadRequest:
        """Read a publication: copy the newest now, or return a request that polls for a version."""
        if version is not None:
            return _VersionedRead(rank, version, self._poll_version)
        request = ReadRequest(rank)
        layout = self._slots.layout
        if self._copy is None:
            self._copy = Message(np.empty(layout.nbytes, np.uint8), layout)
        if self._publication.read(rank, self._copy):
            request.message = self._copy
            self._counters.bytes_received += layout.nbytes
        request.is_settled = True
        return request

    def _poll_version(self, request: _VersionedRead) -> None:
        """Settle the request if its version is published; it is read in place."""
        slot = self._publication.locate(request.rank, request.version)
        if slot is not None:
            self._slots.fence()
            request.message = self._slots.view(request.rank, slot)
            self._counters.bytes_received += self._slots.layout.nbytes
            request.is_settled = True

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        """Return a slot in the inbox of `rank` to write to, or None if the inbox is full."""
        reservation = self._inbox.reserve(rank)
        if reservation is None:
            return None
        message = self._inbox.view_of(reservation)
        assert message is not None, "slots of this node are in place"
        return SendBuffer(rank, message, reservation)

    def send(self, buffer: SendBuffer) -> None:
        """Deliver a buffer of `acquire_send_buffer`."""
        assert buffer.reservation is not None
        self._inbox.send(buffer.reservation, buffer.message)


class _VersionedRead(ReadRequest):
    """A request for a given version, which looks for it whenever it is tested.

    Args:
        rank: owner of the publication.
        version: the version.
        poll: settles the request if the version is published.
    """

    def __init__(self, rank: int, version: int, poll: Callable[[_VersionedRead], None]) -> None:
        super().__init__(rank)
        self.version = version
        self._poll = poll

    def test(self) -> bool:
        if not self.is_settled:
            self._poll(self)
        return self.is_settled
