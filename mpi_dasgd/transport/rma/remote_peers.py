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
from mpi_dasgd.transport.endpoint import ExchangeRequest, ReadRequest, SendBuffer, claim_and_reserve
from mpi_dasgd.transport.inbox import Reservation
from mpi_dasgd.transport.membership import Membership
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.publication import Claim
from mpi_dasgd.transport.rma.progress_context import ProgressContext, Views
from mpi_dasgd.transport.rma.progress_thread import ProgressThread

__all__ = ["RemotePeers"]

_RETRY_SECONDS = 0.0003  # seconds before the courier asks a far rank again


class RemotePeers:
    """What a rank does with those of other nodes. Its methods are called by the compute thread.

    Args:
        rank: this rank.
        ranks: of other nodes.
        views: makes what a courier alone uses: two threads never share an object that changes.
        slots, layout: the payload.
        membership: where ranks that cannot be reached are noted as dead.
        new_thread: makes one that runs what is asked for, until it is stuck and a successor takes over;
            it must give these hands to every task.
    """

    def __init__(
        self,
        rank: int,
        ranks: Collection[int],
        views: Views,
        slots: Slots,
        layout: Layout,
        membership: Membership,
        new_thread: Callable[[ProgressContext], ProgressThread],
    ) -> None:
        self.ranks = frozenset(ranks)
        self.counters: list[Counters] = []  # of each courier
        self._rank = rank
        self._views = views
        self._slots = slots
        self._layout = layout
        self._membership = membership
        self._new_thread = new_thread
        self._outgoing: dict[int, Message] = {}  # while they are on their way
        self._unused: list[Message] = []
        self._context = self._new_context()

    def _new_context(self, predecessor: ProgressContext | None = None) -> ProgressContext:
        hands = ProgressContext(self._rank, self._views, self._layout, predecessor)
        self.counters.append(hands.counters)
        hands.thread = self._new_thread(hands)
        return hands

    def check(self, stall_timeout: float) -> None:
        """Raise what failed in the courier; replace it if it is stuck for more than `stall_timeout` s."""
        for rank in tuple(self._outgoing):
            if self._membership.is_unreachable(rank):
                self._outgoing.pop(rank, None)
        hands = self._context
        hands.check()
        if not self.stalled_peers(stall_timeout):
            return
        hands.supersede()
        # What it waited beyond that may be a pause of this process itself.
        self._membership.add_silence(hands.current_peer, stall_timeout)
        self._context = self._new_context(hands)
        hands.thread.replace(self._context.thread)
        if hands.on_supersede is not None:
            hands.on_supersede()

    def stalled_peers(self, stall_timeout: float) -> set[int]:
        """Return the rank with which the courier is stuck for more than `stall_timeout` s, if it is."""
        hands = self._context
        if hands.thread.busy_seconds <= stall_timeout:
            return set()
        # Stuck with this rank itself, it waits for MPI as a whole, as a successor would.
        return {hands.current_peer} - {self._rank}

    def begin_exchange(self, pairing: ExchangeRequest, candidates: Sequence[int]) -> None:
        """Try to pair with one of `candidates`."""
        self._submit(functools.partial(self._begin_exchange, pairing, candidates))

    def _begin_exchange(
        self, pairing: ExchangeRequest, candidates: Sequence[int], hands: ProgressContext
    ) -> None:
        if not hands.begin_request(functools.partial(setattr, pairing, "is_settled", True)):
            return self.begin_exchange(pairing, candidates)
        met, failed = None, 0
        theirs, reply = hands.message("theirs"), hands.message("reply")
        for rank in hands.iterate_peers(candidates):
            if not self._membership.is_unreachable(rank) and rank not in hands.quarantined:
                with self._mark_dead_on_failure(rank):
                    met = claim_and_reserve(hands.publication, hands.inbox, rank)
                    if met is not None:
                        self._slots.get(rank, met[0].slot, theirs)
                        hands.counters.bytes_received += theirs.layout.nbytes
                        break
                met = None
            failed += 1
        with hands.publish_result() as current:
            if current:
                pairing.failed_attempts += failed
                if met is None:
                    pairing.is_settled = True
                else:
                    pairing.settle(*met, theirs, reply)
        if met is not None and not current:  # nobody else knows of it
            with self._mark_dead_on_failure(met[0].rank):
                _release(*met, hands)

    def commit_exchange(self, pairing: ExchangeRequest) -> None:
        """Deliver the reply, then release the partner's publication."""
        claim, reservation, reply = pairing.claim, pairing.reservation, pairing.partner_delta
        assert claim is not None and reservation is not None and reply is not None

        def deliver(hands: ProgressContext) -> None:
            hands.inbox.send(reservation, reply)
            hands.publication.release(claim)

        self._submit_for(claim.rank, deliver)

    def abort_exchange(self, pairing: ExchangeRequest) -> None:
        """Give back what a settled pairing holds."""
        claim, reservation = pairing.claim, pairing.reservation
        assert claim is not None and reservation is not None
        self._submit_for(claim.rank, functools.partial(_release, claim, reservation))

    def read(self, rank: int, version: int | None) -> ReadRequest:
        """Ask for a publication; a given version of an avoided rank is waited for, the newest is not."""
        reading = ReadRequest(rank)
        self._submit(functools.partial(self._read, reading, version))
        return reading

    def _read(self, reading: ReadRequest, version: int | None, hands: ProgressContext) -> None:
        rank, copy = reading.rank, hands.message("copy")
        again = functools.partial(self._submit, functools.partial(self._read, reading, version))
        give_up = functools.partial(setattr, reading, "is_settled", True)
        if not hands.begin_request(give_up if version is None else again):
            return again()
        found = late = False
        if self._membership.is_unreachable(rank):
            pass
        elif rank in hands.quarantined:
            late = version is not None
        elif hands.switch_to(rank):
            with self._mark_dead_on_failure(rank):
                if version is None:
                    found = hands.publication.read(rank, copy)
                elif (slot := hands.publication.locate(rank, version)) is None:
                    late = True
                else:
                    self._slots.get(rank, slot, copy)
                    found = True
        with hands.publish_result() as current:
            if current and not late:
                if found:
                    reading.message = copy
                    hands.counters.bytes_received += self._layout.nbytes
                reading.is_settled = True
        if current and late:
            time.sleep(_RETRY_SECONDS)
            again()

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        """Return a staging area; None if `rank` is avoided or the last message is still on its way."""
        if not self._membership.is_unreachable(rank) and rank in {
            *self._outgoing,
            *self._context.quarantined,
        }:
            return None
        return SendBuffer(rank, self._unused.pop() if self._unused else self._new_message())

    def _new_message(self) -> Message:
        return Message(np.empty(self._layout.nbytes, np.uint8), self._layout)

    def send(self, posting: SendBuffer) -> None:
        """Send a message; the courier tries until there is room for it."""
        self._outgoing[posting.rank] = posting.message
        self._submit_for(posting.rank, functools.partial(self._send, posting))

    def _send(self, posting: SendBuffer, hands: ProgressContext) -> None:
        rank = posting.rank
        reservation = hands.inbox.reserve(rank)
        if reservation is None:
            time.sleep(_RETRY_SECONDS)
            self._submit_for(rank, functools.partial(self._send, posting))
            return
        hands.inbox.send(reservation, posting.message)
        self._unused.append(posting.message)
        self._outgoing.pop(rank, None)

    def is_flushed(self) -> bool:
        """Return whether all that was asked for is done, but for what went to ranks that are gone."""
        pending = {*self._outgoing, *self._context.quarantined}
        return self._context.thread.idle and all(map(self._membership.is_unreachable, pending))

    def close(self, timeout: float) -> bool:
        """End the courier; return False if it is stuck."""
        return self._context.close(timeout)

    def _submit(self, task: Callable[[ProgressContext], None]) -> None:
        """Have the courier do something."""
        self._context.thread.submit(task)

    def _submit_for(self, rank: int, task: Callable[[ProgressContext], None]) -> None:
        """Have the courier do something with a rank, which may be gone; waits while it is avoided."""

        def attempt(hands: ProgressContext) -> None:
            if self._membership.is_unreachable(rank):
                return
            if rank in hands.quarantined or not hands.switch_to(rank):
                time.sleep(_RETRY_SECONDS)
                self._submit(attempt)
                return
            with self._mark_dead_on_failure(rank):
                task(hands)

        self._submit(attempt)

    @contextlib.contextmanager
    def _mark_dead_on_failure(self, rank: int) -> Iterator[None]:
        """A stretch of calls to `rank`; it is dead if it cannot be reached."""
        try:
            yield
        except Unreachable:
            self._membership.dead.add(rank)


def _release(claim: Claim, reservation: Reservation, hands: ProgressContext) -> None:
    """Release a publication and a slot of an inbox."""
    hands.inbox.cancel(reservation)
    hands.publication.release(claim)
