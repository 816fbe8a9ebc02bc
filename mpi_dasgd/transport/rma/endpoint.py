"""The endpoint on real MPI windows: in place within a node, Get and Put by a courier between nodes."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
from mpi4py import MPI

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import PeerLost
from mpi_dasgd.kernels import native
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.control_words import WordMap
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import Endpoint, Pairing, Pending, Posting, Reading, meet
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.membership import LEFT, Board
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.rma.allreduce import Sums
from mpi_dasgd.transport.rma.progress_context import Hands
from mpi_dasgd.transport.rma.progress_thread import Courier
from mpi_dasgd.transport.rma.remote_peers import FarRanks
from mpi_dasgd.transport.rma.shared_memory import NodeWords
from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords

__all__ = ["RmaEndpoint"]

_CHORES = 0.05  # seconds between heartbeats, and between looks at other nodes
_POLL = 0.001  # seconds between looks at the last barrier
_MANY = 128  # ranks of a node, above which their gradients are not counted at every step


class RmaEndpoint(Endpoint):
    """One rank's transport on MPI windows. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks; not used for anything else.
        layout: of every message.
        topology: who may talk to whom.
        path: see `WindowSlots`.
        publication_slots, inbox_slots: number of slots.
        held: see `Publication`.
        progress_interval: seconds between calls into MPI when there are several nodes.
        silence: seconds without a heartbeat after which a rank counts as dead.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layout: Layout,
        topology: Topology,
        *,
        path: str = "auto",
        publication_slots: int = 4,
        inbox_slots: int = 4,
        held: int = 2,
        progress_interval: float = 0.0003,
        silence: float = 10.0,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm = comm
        node = cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED))
        where = WordMap(publication_slots, inbox_slots)
        self._words = _words(comm, node, where.count, path)
        self._slots = WindowSlots(comm, node, layout, publication_slots + inbox_slots, path)
        node.Free()
        self._near = self._slots.near
        far = frozenset(range(self.size)).difference(self._near)
        self.topology = topology
        self._neighbours: Sequence[int] = topology.neighbours(self.rank)
        self._dead: set[int] = set()

        self.counters = Counters()
        self.publication = Publication(
            self._words, self._slots, where, self.rank, self.counters, held
        )
        self.inbox = Inbox(self._words, self._slots, where, self.rank, self.counters)
        self._layout = layout
        self.board = Board(self._words, self.rank, self.size, silence)
        self._silence = silence
        self._closed = False
        self._copy: Message | None = None  # of a publication that was read
        if far:
            sys.setswitchinterval(0.0005)  # a GIL holder delays the courier's answer by this much
        sent: defaultdict[int, int] = defaultdict(int)

        def views(counters: Counters) -> tuple[Publication, Inbox]:
            shared = self._words, self._slots, where, self.rank, counters
            return Publication(*shared, held), Inbox(*shared, sent)

        def courier(hands: Hands) -> Courier:
            # On the communicator of all ranks: on COMM_SELF MPICH 5 makes no progress between hosts.
            progress = comm.Iprobe if far else None
            return Courier(self._chore, _CHORES, progress, progress_interval, (hands,))

        self._far = FarRanks(self.rank, far, views, self._slots, layout, self.board, courier)
        self._sums = Sums(comm, silence, lambda: self.board.dead | self._far.stuck(silence))

    def _chore(self, hands: Hands) -> None:
        board = self.board
        if hands.visit(self.rank):
            board.beat(self._words)
        board.watch(hands.tour(range(self.size)), self._words, hands.avoided)

    @property
    def path(self) -> str:
        """How payload travels, in words."""
        return self._slots.describe

    def look(self) -> None:
        """Read the notices of this node's ranks, and deal with ranks that died."""
        self.board.refresh(self._near)
        self._far.look(self._silence / 3)  # before its own beat is missed
        for rank in self.board.dead - self._dead:
            self.publication.forget(rank)
            self.inbox.forget(rank)
            self._dead.add(rank)
            self._neighbours = self.topology.without(self._dead).neighbours(self.rank)

    def neighbours(self) -> Sequence[int]:
        """Return the neighbours that live."""
        return self._neighbours

    def pair(self, candidates: Sequence[int]) -> Pairing:
        """Try to pair with one of `candidates`; those of other nodes are tried by the courier."""
        if self._closed:
            raise RuntimeError("transport is closed")
        pairing = Pairing()
        for position, rank in enumerate(candidates):
            if rank in self._far.ranks:
                # The compute thread alone talks to ranks of its node, so these are not tried again.
                self._far.pair(pairing, [r for r in candidates[position:] if r in self._far.ranks])
                return pairing
            if self._pair_near(pairing, rank):
                return pairing
            pairing.failed += 1
        pairing.settled = True
        return pairing

    def _pair_near(self, pairing: Pairing, rank: int) -> bool:
        met = meet(self.publication, self.inbox, rank)
        if met is None:
            return False
        claim, reservation = met
        theirs = self._slots.at(rank, claim.slot)
        assert theirs is not None
        self._slots.sync()
        self.counters.bytes_received += theirs.layout.nbytes
        pairing.settle(claim, reservation, theirs, self.inbox.place(reservation))
        return True

    def immediate(self, rank: int) -> bool:
        """Ranks of this node answer at once."""
        return rank not in self._far.ranks

    def complete(self, pairing: Pairing) -> None:
        """Deliver the reply, then release the partner's publication."""
        assert pairing.claim is not None and pairing.reservation is not None
        assert pairing.reply is not None
        if pairing.claim.rank in self._far.ranks:
            self._far.complete(pairing)
        else:
            self.inbox.send(pairing.reservation, pairing.reply)
            self.publication.release(pairing.claim)

    def abandon(self, pairing: Pairing) -> None:
        """Give back what a settled pairing holds."""
        if pairing.claim is None or pairing.reservation is None:
            return
        if pairing.claim.rank in self._far.ranks:
            self._far.abandon(pairing)
        else:
            self.inbox.cancel(pairing.reservation)
            self.publication.release(pairing.claim)

    def read(self, rank: int, version: int | None = None) -> Reading:
        """Ask for a publication; those of other nodes are got by the courier."""
        if rank in self._far.ranks:
            return self._far.read(rank, version)
        if version is not None:
            return _Versioned(rank, self._look_again, version)
        reading = Reading(rank)
        if self._copy is None:
            self._copy = Message(np.empty(self._layout.nbytes, np.uint8), self._layout)
        if self.publication.read(rank, self._copy):
            reading.message = self._copy
            self.counters.bytes_received += self._layout.nbytes
        reading.settled = True
        return reading

    def _look_again(self, reading: _Versioned) -> None:
        """See whether the version is there; it is read in place."""
        slot = self.publication.locate(reading.rank, reading.version)
        if slot is not None:
            self._slots.sync()
            reading.message = self._slots.at(reading.rank, slot)
            self.counters.bytes_received += self._layout.nbytes
            reading.settled = True

    def post(self, rank: int) -> Posting | None:
        """Return a message to write: in the inbox of a rank of this node, else a staging area."""
        if rank in self._far.ranks:
            return self._far.post(rank)
        reservation = self.inbox.reserve(rank)
        if reservation is None:
            return None
        place = self.inbox.place(reservation)
        assert place is not None
        return Posting(rank, place, reservation)

    def deliver(self, posting: Posting) -> None:
        """Send a message; the courier tries until there is room in a far inbox."""
        if posting.reservation is None:
            self._far.deliver(posting)
        else:
            self.inbox.send(posting.reservation, posting.message)

    def until(self, condition: Callable[[], bool], ranks: Iterable[int] | None = None) -> Pending:
        """Return what is done when `condition` holds; whoever waits polls it."""
        return _Until(condition)

    def gradients(self) -> int:
        """Count those of this node's ranks now, others as of the courier's last look."""
        if len(self._near) <= _MANY:
            self.board.recount(self._near)
        return sum(self.board.gradients)

    def gradients_of(self, rank: int) -> int:
        """As `gradients`, of one rank."""
        if rank not in self._far.ranks:
            self.board.recount((rank,))
        return self.board.gradients[rank]

    def count(self, gradients: int) -> None:
        self.board.count(gradients)

    def delivered(self) -> bool:
        return self._far.delivered()

    def time_ns(self) -> int:
        return time.time_ns()

    def allreduce(self, array: np.ndarray) -> Pending:
        """Sum `array` over all ranks in place."""
        return self._sums.begin(array)

    def totals(self) -> Counters:
        """Return the counts of all threads together."""
        return Counters(
            *(
                sum(
                    getattr(counters, field.name)
                    for counters in (self.counters, *self._far.counters)
                )
                for field in dataclasses.fields(Counters)
            )
        )

    def close(self, timeout: float = 10.0) -> None:
        """Wait for the others, end the courier, and free the windows; later calls do nothing.

        Raises:
            PeerLost: ranks have died, or given this one up, so that windows cannot be freed; leave by
                `os._exit` then.
        """
        if self._closed:
            return
        self._closed = True
        alone = 0  # looks at a barrier that others have left without
        try:
            arrived = self._comm.Ibarrier()
            while not (arrived.Test() or self.board.dead or alone * _POLL > self._silence):
                time.sleep(_POLL)
                self.look()
                alone += LEFT in self.board.status
        except MPI.Exception as error:
            raise PeerLost(f"the other ranks cannot be reached: {error}") from error
        self.board.announce(LEFT)
        stuck = not self._far.close(timeout)
        if alone * _POLL > self._silence:
            raise PeerLost("the others have given this rank up and left: windows cannot be freed")
        if stuck or self.board.dead:
            raise PeerLost(f"ranks {sorted(self.board.dead)} are gone: windows cannot be freed")
        self._slots.close()
        self._words.close()


def _words(
    comm: MPI.Intracomm, node: MPI.Intracomm, count: int, path: str
) -> NodeWords | WindowWords:
    """Make the control words: by the processor's atomics if all ranks share memory, else by MPI's."""
    library = native.load()
    shared = path != "remote" and node.size == comm.size and library is not None
    if comm.allreduce(shared, MPI.LAND):
        assert library is not None
        return NodeWords(comm, count, library)
    return WindowWords(comm, count)


class _Until:
    """Done when a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.done = condition


class _Versioned(Reading):
    """A version of a rank of this node, looked for whenever somebody asks whether it is there."""

    def __init__(self, rank: int, look: Callable[[_Versioned], None], version: int) -> None:
        super().__init__(rank)
        self.version = version
        self._look = look

    def done(self) -> bool:
        if not self.settled:
            self._look(self)
        return self.settled
