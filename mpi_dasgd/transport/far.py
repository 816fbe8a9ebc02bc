"""Ranks of other nodes: a courier does all that concerns them, so that the compute thread never waits."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import Unreachable
from mpi_dasgd.transport.board import Board
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.courier import Courier
from mpi_dasgd.transport.endpoint import Pairing, Posting, Reading, meet
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.slots import Slots

__all__ = ["FarRanks"]

_AGAIN = 0.0003  # seconds before the courier asks a far rank again


class FarRanks:
    """What a rank does with those of other nodes. Its methods are called by the compute thread.

    Args:
        ranks: of other nodes.
        neighbours: whether any of them may be paired with.
        publication, inbox: views for the courier alone: two threads never share an object that changes.
        counters: of these.
        slots, layout: the payload.
        board: where ranks that cannot be reached are noted as dead.
        courier: runs what is asked for, until it is stuck and a successor takes over.
    """

    def __init__(
        self,
        ranks: Collection[int],
        neighbours: bool,
        publication: Publication,
        inbox: Inbox,
        counters: Counters,
        slots: Slots,
        layout: Layout,
        board: Board,
        courier: Courier,
    ) -> None:
        self.ranks = frozenset(ranks)
        self.counters = counters
        self._neighbours = neighbours
        self._publication = publication
        self._inbox = inbox
        self._slots = slots
        self._layout = layout
        self._board = board
        self._courier = courier
        self._staging = self._new_staging()
        self._asked: Pairing | Reading | None = None  # what the courier has in hand
        self._copy: Message | None = None  # of a publication that was read
        self._outgoing: dict[int, Message] = {}  # while they are on their way
        self._unused: list[Message] = []

    def _new_message(self) -> Message:
        return Message(np.empty(self._layout.nbytes, np.uint8), self._layout)

    def _new_staging(self) -> tuple[Message, Message] | None:
        """Where publications are got to, and replies to them put from."""
        return (self._new_message(), self._new_message()) if self._neighbours else None

    def look(self, patience: float) -> None:
        """Raise what failed in the courier; replace it if it is stuck for more than `patience` seconds."""
        self._courier.check()
        if self._courier.busy_seconds > patience:
            # In a call to a rank that is gone: its answer will never come.
            self._board.dead.add(self._board.attending)
            self._courier = self._courier.replace()
            self._staging = self._new_staging()  # the old one may still be written to
            if self._asked is not None:
                self._asked.settled = True

    def pair(self, pairing: Pairing, candidates: Sequence[int]) -> None:
        """Try to pair with one of `candidates`."""
        self._courier.submit(functools.partial(self._pair, pairing, candidates))

    def _pair(self, pairing: Pairing, candidates: Sequence[int]) -> None:
        assert self._staging is not None
        theirs, reply = self._staging
        self._asked = pairing
        for rank in candidates:
            self._board.attending = rank
            try:
                met = meet(self._publication, self._inbox, rank)
                if met is not None:
                    claim, reservation = met
                    self._slots.get(rank, claim.slot, theirs)
                    self.counters.bytes_received += theirs.layout.nbytes
                    pairing.settle(claim, reservation, theirs, reply)
                    break
            except Unreachable:
                self._board.dead.add(rank)
            pairing.failed += 1
        pairing.settled = True
        self._asked = None

    def complete(self, pairing: Pairing) -> None:
        """Deliver the reply, then release the partner's publication."""
        claim, reservation, reply = pairing.claim, pairing.reservation, pairing.reply
        assert claim is not None and reservation is not None and reply is not None

        def deliver() -> None:
            self._inbox.send(reservation, reply)
            self._publication.release(claim)

        self._submit(claim.rank, deliver)

    def abandon(self, pairing: Pairing) -> None:
        """Give back what a settled pairing holds."""
        claim, reservation = pairing.claim, pairing.reservation
        assert claim is not None and reservation is not None

        def give_back() -> None:
            self._inbox.cancel(reservation)
            self._publication.release(claim)

        self._submit(claim.rank, give_back)

    def read(self, rank: int, version: int | None) -> Reading:
        """Ask for a publication."""
        reading = Reading(rank)
        self._copy = self._copy or self._new_message()
        self._submit(rank, functools.partial(self._read, reading, version))
        return reading

    def _read(self, reading: Reading, version: int | None) -> None:
        assert self._copy is not None
        rank, copy = reading.rank, self._copy
        self._asked = reading
        try:
            if version is None:
                found = self._publication.read(rank, copy)
            else:
                slot = self._publication.locate(rank, version)
                if slot is None:
                    time.sleep(_AGAIN)
                    self._submit(rank, functools.partial(self._read, reading, version))
                    return
                self._slots.get(rank, slot, copy)
                found = True
        except Unreachable:
            self._board.dead.add(rank)
            found = False
        self._asked = None
        if found:
            reading.message = copy
            self.counters.bytes_received += self._layout.nbytes
        reading.settled = True

    def post(self, rank: int) -> Posting | None:
        """Return a staging area, or None while the last message to `rank` is on its way."""
        if rank in self._outgoing:
            return None
        return Posting(rank, self._unused.pop() if self._unused else self._new_message())

    def deliver(self, posting: Posting) -> None:
        """Send a message; the courier tries until there is room for it."""
        self._outgoing[posting.rank] = posting.message
        self._submit(posting.rank, functools.partial(self._send, posting))

    def _send(self, posting: Posting) -> None:
        rank = posting.rank
        if rank not in self._board.dead:
            reservation = self._inbox.reserve(rank)
            if reservation is None:
                time.sleep(_AGAIN)
                self._submit(rank, functools.partial(self._send, posting))
                return
            self._inbox.send(reservation, posting.message)
        self._unused.append(posting.message)
        del self._outgoing[rank]

    def delivered(self) -> bool:
        """Return whether all that was asked for is done."""
        return self._courier.idle and not self._outgoing

    def close(self, timeout: float) -> bool:
        """End the courier; return False if it is stuck."""
        return self._courier.close(timeout)

    def _submit(self, rank: int, task: Callable[[], None]) -> None:
        """Have the courier do something with a rank, which may be gone."""

        def attempt() -> None:
            self._board.attending = rank
            try:
                task()
            except Unreachable:
                self._board.dead.add(rank)

        self._courier.submit(attempt)
