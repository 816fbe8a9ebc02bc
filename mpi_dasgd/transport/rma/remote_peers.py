"""Ranks of other nodes: a courier does all that concerns them, so that the compute thread never waits.

A courier that is stuck in a call is replaced. The rank that it attends is *avoided* until the call
returns: it is not asked for anything, what must reach it waits, and the time counts as its silence.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import Unreachable
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import Pairing, Posting, Reading, meet
from mpi_dasgd.transport.inbox import Reservation
from mpi_dasgd.transport.membership import Board
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.publication import Claim
from mpi_dasgd.transport.rma.progress_context import Hands, Views
from mpi_dasgd.transport.rma.progress_thread import Courier

__all__ = ["FarRanks"]

_AGAIN = 0.0003  # seconds before the courier asks a far rank again


class FarRanks:
    """What a rank does with those of other nodes. Its methods are called by the compute thread.

    Args:
        rank: this rank.
        ranks: of other nodes.
        views: makes what a courier alone uses: two threads never share an object that changes.
        slots, layout: the payload.
        board: where ranks that cannot be reached are noted as dead.
        courier: makes one that runs what is asked for, until it is stuck and a successor takes over;
            it must give these hands to every task.
    """

    def __init__(
        self,
        rank: int,
        ranks: Collection[int],
        views: Views,
        slots: Slots,
        layout: Layout,
        board: Board,
        courier: Callable[[Hands], Courier],
    ) -> None:
        self.ranks = frozenset(ranks)
        self.counters: list[Counters] = []  # of each courier
        self._rank = rank
        self._views = views
        self._slots = slots
        self._layout = layout
        self._board = board
        self._new_courier = courier
        self._outgoing: dict[int, Message] = {}  # while they are on their way
        self._unused: list[Message] = []
        self._hands = self._new_hands()

    def _new_hands(self, predecessor: Hands | None = None) -> Hands:
        hands = Hands(self._rank, self._views, self._layout, predecessor)
        self.counters.append(hands.counters)
        hands.courier = self._new_courier(hands)
        return hands

    def look(self, patience: float) -> None:
        """Raise what failed in the courier; replace it if it is stuck for more than `patience` seconds."""
        for rank in tuple(self._outgoing):
            if self._board.gone(rank):
                self._outgoing.pop(rank, None)
        hands = self._hands
        hands.check()
        if not self.stuck(patience):
            return
        hands.supersede()
        # What it waited beyond that may be a pause of this process itself.
        self._board.missed(hands.attending, patience)
        self._hands = self._new_hands(hands)
        hands.courier.replace(self._hands.courier)
        if hands.otherwise is not None:
            hands.otherwise()

    def stuck(self, patience: float) -> set[int]:
        """Return the rank with which the courier is stuck for more than `patience` seconds, if it is."""
        hands = self._hands
        if hands.courier.busy_seconds <= patience:
            return set()
        # Stuck with this rank itself, it waits for MPI as a whole, as a successor would.
        return {hands.attending} - {self._rank}

    def pair(self, pairing: Pairing, candidates: Sequence[int]) -> None:
        """Try to pair with one of `candidates`."""
        self._give(functools.partial(self._pair, pairing, candidates))

    def _pair(self, pairing: Pairing, candidates: Sequence[int], hands: Hands) -> None:
        if not hands.begin(functools.partial(setattr, pairing, "settled", True)):
            return self.pair(pairing, candidates)
        met, failed = None, 0
        theirs, reply = hands.message("theirs"), hands.message("reply")
        for rank in hands.tour(candidates):
            if not self._board.gone(rank) and rank not in hands.avoided:
                with self._reaching(rank):
                    met = meet(hands.publication, hands.inbox, rank)
                    if met is not None:
                        self._slots.get(rank, met[0].slot, theirs)
                        hands.counters.bytes_received += theirs.layout.nbytes
                        break
                met = None
            failed += 1
        with hands.ending() as current:
            if current:
                pairing.failed += failed
                if met is None:
                    pairing.settled = True
                else:
                    pairing.settle(*met, theirs, reply)
        if met is not None and not current:  # nobody else knows of it
            with self._reaching(met[0].rank):
                _give_back(*met, hands)

    def complete(self, pairing: Pairing) -> None:
        """Deliver the reply, then release the partner's publication."""
        claim, reservation, reply = pairing.claim, pairing.reservation, pairing.reply
        assert claim is not None and reservation is not None and reply is not None

        def deliver(hands: Hands) -> None:
            hands.inbox.send(reservation, reply)
            hands.publication.release(claim)

        self._give_for(claim.rank, deliver)

    def abandon(self, pairing: Pairing) -> None:
        """Give back what a settled pairing holds."""
        claim, reservation = pairing.claim, pairing.reservation
        assert claim is not None and reservation is not None
        self._give_for(claim.rank, functools.partial(_give_back, claim, reservation))

    def read(self, rank: int, version: int | None) -> Reading:
        """Ask for a publication; a given version of an avoided rank is waited for, the newest is not."""
        reading = Reading(rank)
        self._give(functools.partial(self._read, reading, version))
        return reading

    def _read(self, reading: Reading, version: int | None, hands: Hands) -> None:
        rank, copy = reading.rank, hands.message("copy")
        again = functools.partial(self._give, functools.partial(self._read, reading, version))
        give_up = functools.partial(setattr, reading, "settled", True)
        if not hands.begin(give_up if version is None else again):
            return again()
        found = late = False
        if self._board.gone(rank):
            pass
        elif rank in hands.avoided:
            late = version is not None
        elif hands.visit(rank):
            with self._reaching(rank):
                if version is None:
                    found = hands.publication.read(rank, copy)
                elif (slot := hands.publication.locate(rank, version)) is None:
                    late = True
                else:
                    self._slots.get(rank, slot, copy)
                    found = True
        with hands.ending() as current:
            if current and not late:
                if found:
                    reading.message = copy
                    hands.counters.bytes_received += self._layout.nbytes
                reading.settled = True
        if current and late:
            time.sleep(_AGAIN)
            again()

    def post(self, rank: int) -> Posting | None:
        """Return a staging area; None if `rank` is avoided or the last message is still on its way."""
        if not self._board.gone(rank) and rank in {*self._outgoing, *self._hands.avoided}:
            return None
        return Posting(rank, self._unused.pop() if self._unused else self._new_message())

    def _new_message(self) -> Message:
        return Message(np.empty(self._layout.nbytes, np.uint8), self._layout)

    def deliver(self, posting: Posting) -> None:
        """Send a message; the courier tries until there is room for it."""
        self._outgoing[posting.rank] = posting.message
        self._give_for(posting.rank, functools.partial(self._send, posting))

    def _send(self, posting: Posting, hands: Hands) -> None:
        rank = posting.rank
        reservation = hands.inbox.reserve(rank)
        if reservation is None:
            time.sleep(_AGAIN)
            self._give_for(rank, functools.partial(self._send, posting))
            return
        hands.inbox.send(reservation, posting.message)
        self._unused.append(posting.message)
        self._outgoing.pop(rank, None)

    def delivered(self) -> bool:
        """Return whether all that was asked for is done, but for what went to ranks that are gone."""
        pending = {*self._outgoing, *self._hands.avoided}
        return self._hands.courier.idle and all(map(self._board.gone, pending))

    def close(self, timeout: float) -> bool:
        """End the courier; return False if it is stuck."""
        return self._hands.close(timeout)

    def _give(self, task: Callable[[Hands], None]) -> None:
        """Have the courier do something."""
        self._hands.courier.submit(task)

    def _give_for(self, rank: int, task: Callable[[Hands], None]) -> None:
        """Have the courier do something with a rank, which may be gone; waits while it is avoided."""

        def attempt(hands: Hands) -> None:
            if self._board.gone(rank):
                return
            if rank in hands.avoided or not hands.visit(rank):
                time.sleep(_AGAIN)
                self._give(attempt)
                return
            with self._reaching(rank):
                task(hands)

        self._give(attempt)

    @contextlib.contextmanager
    def _reaching(self, rank: int) -> Iterator[None]:
        """A stretch of calls to `rank`; it is dead if it cannot be reached."""
        try:
            yield
        except Unreachable:
            self._board.dead.add(rank)


def _give_back(claim: Claim, reservation: Reservation, hands: Hands) -> None:
    """Release a publication and a slot of an inbox."""
    hands.inbox.cancel(reservation)
    hands.publication.release(claim)
