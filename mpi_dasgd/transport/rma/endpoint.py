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
from mpi_dasgd.transport.endpoint import (
    Endpoint,
    ExchangeRequest,
    ReadRequest,
    Request,
    SendBuffer,
    claim_and_reserve,
)
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.membership import DEPARTED, Membership
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.rma.allreduce import WatchedAllreduce
from mpi_dasgd.transport.rma.progress_context import ProgressContext
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.transport.rma.remote_peers import RemotePeers
from mpi_dasgd.transport.rma.shared_memory import NodeWords
from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords

__all__ = ["RmaEndpoint"]

_TASK_SECONDS = 0.05  # seconds between heartbeats, and between looks at other nodes
_POLL = 0.001  # seconds between looks at the last barrier
_MANY = 128  # ranks of a node, above which their gradients are not counted at every step


class RmaEndpoint(Endpoint):
    """One rank's transport on MPI windows. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks; not used for anything else.
        layout: of every message.
        topology: who may talk to whom.
        mode: see `WindowSlots`.
        publication_slots, inbox_slots: number of slots.
        held: see `Publication`.
        progress_interval: seconds between calls into MPI when there are several nodes.
        heartbeat_timeout: seconds without a heartbeat after which a rank counts as dead.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layout: Layout,
        topology: Topology,
        *,
        mode: str = "auto",
        publication_slots: int = 4,
        inbox_slots: int = 4,
        held: int = 2,
        progress_interval: float = 0.0003,
        heartbeat_timeout: float = 10.0,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm = comm
        node = cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED))
        where = WordMap(publication_slots, inbox_slots)
        self._words = _words(comm, node, where.count, mode)
        self._slots = WindowSlots(comm, node, layout, publication_slots + inbox_slots, mode)
        node.Free()
        self._node_ranks = self._slots.node_ranks
        far = frozenset(range(self.size)).difference(self._node_ranks)
        self.topology = topology
        self._neighbours: Sequence[int] = topology.neighbours(self.rank)
        self._dead: set[int] = set()

        self.counters = Counters()
        self.publication = Publication(
            self._words, self._slots, where, self.rank, self.counters, held
        )
        self.inbox = Inbox(self._words, self._slots, where, self.rank, self.counters)
        self._layout = layout
        self.membership = Membership(self._words, self.rank, self.size, heartbeat_timeout)
        self._heartbeat_timeout = heartbeat_timeout
        self._closed = False
        self._copy: Message | None = None  # of a publication that was read
        if far:
            sys.setswitchinterval(0.0005)  # a GIL holder delays the courier's answer by this much
        sent: defaultdict[int, int] = defaultdict(int)

        def views(counters: Counters) -> tuple[Publication, Inbox]:
            shared = self._words, self._slots, where, self.rank, counters
            return Publication(*shared, held), Inbox(*shared, sent)

        def courier(hands: ProgressContext) -> ProgressThread:
            # On the communicator of all ranks: on COMM_SELF MPICH 5 makes no progress between hosts.
            progress = comm.Iprobe if far else None
            return ProgressThread(
                self._periodic_task, _TASK_SECONDS, progress, progress_interval, (hands,)
            )

        self._remote = RemotePeers(
            self.rank, far, views, self._slots, layout, self.membership, courier
        )
        self._allreduce = WatchedAllreduce(
            comm,
            heartbeat_timeout,
            lambda: self.membership.dead | self._remote.stalled_peers(heartbeat_timeout),
        )

    def _periodic_task(self, hands: ProgressContext) -> None:
        board = self.membership
        if hands.switch_to(self.rank):
            board.send_heartbeat(self._words)
        board.detect_failures(hands.iterate_peers(range(self.size)), self._words, hands.quarantined)

    @property
    def transfer_mode(self) -> str:
        """How payload travels, in words."""
        return self._slots.transfer_mode

    def refresh_membership(self) -> None:
        """Read the notices of this node's ranks, and deal with ranks that died."""
        self.membership.refresh(self._node_ranks)
        self._remote.check(self._heartbeat_timeout / 3)  # before its own beat is missed
        for rank in self.membership.dead - self._dead:
            self.publication.reclaim_from(rank)
            self.inbox.reclaim_from(rank)
            self._dead.add(rank)
            self._neighbours = self.topology.without(self._dead).neighbours(self.rank)

    def neighbours(self) -> Sequence[int]:
        """Return the neighbours that live."""
        return self._neighbours

    def begin_exchange(self, candidates: Sequence[int]) -> ExchangeRequest:
        """Try to pair with one of `candidates`; those of other nodes are tried by the courier."""
        if self._closed:
            raise RuntimeError("transport is closed")
        pairing = ExchangeRequest()
        for position, rank in enumerate(candidates):
            if rank in self._remote.ranks:
                # The compute thread alone talks to ranks of its node, so these are not tried again.
                self._remote.begin_exchange(
                    pairing, [r for r in candidates[position:] if r in self._remote.ranks]
                )
                return pairing
            if self._begin_on_node(pairing, rank):
                return pairing
            pairing.failed_attempts += 1
        pairing.is_settled = True
        return pairing

    def _begin_on_node(self, pairing: ExchangeRequest, rank: int) -> bool:
        met = claim_and_reserve(self.publication, self.inbox, rank)
        if met is None:
            return False
        claim, reservation = met
        theirs = self._slots.view(rank, claim.slot)
        assert theirs is not None
        self._slots.fence()
        self.counters.bytes_received += theirs.layout.nbytes
        pairing.settle(claim, reservation, theirs, self.inbox.view_of(reservation))
        return True

    def is_local(self, rank: int) -> bool:
        """Ranks of this node answer at once."""
        return rank not in self._remote.ranks

    def commit_exchange(self, pairing: ExchangeRequest) -> None:
        """Deliver the reply, then release the partner's publication."""
        assert pairing.claim is not None and pairing.reservation is not None
        assert pairing.partner_delta is not None
        if pairing.claim.rank in self._remote.ranks:
            self._remote.commit_exchange(pairing)
        else:
            self.inbox.send(pairing.reservation, pairing.partner_delta)
            self.publication.release(pairing.claim)

    def abort_exchange(self, pairing: ExchangeRequest) -> None:
        """Give back what a settled pairing holds."""
        if pairing.claim is None or pairing.reservation is None:
            return
        if pairing.claim.rank in self._remote.ranks:
            self._remote.abort_exchange(pairing)
        else:
            self.inbox.cancel(pairing.reservation)
            self.publication.release(pairing.claim)

    def read(self, rank: int, version: int | None = None) -> ReadRequest:
        """Ask for a publication; those of other nodes are got by the courier."""
        if rank in self._remote.ranks:
            return self._remote.read(rank, version)
        if version is not None:
            return _VersionedRead(rank, self._poll_version, version)
        reading = ReadRequest(rank)
        if self._copy is None:
            self._copy = Message(np.empty(self._layout.nbytes, np.uint8), self._layout)
        if self.publication.read(rank, self._copy):
            reading.message = self._copy
            self.counters.bytes_received += self._layout.nbytes
        reading.is_settled = True
        return reading

    def _poll_version(self, reading: _VersionedRead) -> None:
        """See whether the version is there; it is read in place."""
        slot = self.publication.locate(reading.rank, reading.version)
        if slot is not None:
            self._slots.fence()
            reading.message = self._slots.view(reading.rank, slot)
            self.counters.bytes_received += self._layout.nbytes
            reading.is_settled = True

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        """Return a message to write: in the inbox of a rank of this node, else a staging area."""
        if rank in self._remote.ranks:
            return self._remote.acquire_send_buffer(rank)
        reservation = self.inbox.reserve(rank)
        if reservation is None:
            return None
        place = self.inbox.view_of(reservation)
        assert place is not None
        return SendBuffer(rank, place, reservation)

    def send(self, posting: SendBuffer) -> None:
        """Send a message; the courier tries until there is room in a far inbox."""
        if posting.reservation is None:
            self._remote.send(posting)
        else:
            self.inbox.send(posting.reservation, posting.message)

    def wait_until(
        self, condition: Callable[[], bool], ranks: Iterable[int] | None = None
    ) -> Request:
        """Return what is done when `condition` holds; whoever waits polls it."""
        return _Condition(condition)

    def gradients(self) -> int:
        """Count those of this node's ranks now, others as of the courier's last look."""
        if len(self._node_ranks) <= _MANY:
            self.membership.refresh_gradients(self._node_ranks)
        return sum(self.membership.gradients)

    def gradients_of(self, rank: int) -> int:
        """As `gradients`, of one rank."""
        if rank not in self._remote.ranks:
            self.membership.refresh_gradients((rank,))
        return self.membership.gradients[rank]

    def report_gradients(self, gradients: int) -> None:
        self.membership.report_gradients(gradients)

    def is_flushed(self) -> bool:
        return self._remote.is_flushed()

    def time_ns(self) -> int:
        return time.time_ns()

    def allreduce(self, array: np.ndarray) -> Request:
        """Sum `array` over all ranks in place."""
        return self._allreduce.begin(array)

    def total_counters(self) -> Counters:
        """Return the counts of all threads together."""
        return Counters(
            *(
                sum(
                    getattr(counters, field.name)
                    for counters in (self.counters, *self._remote.counters)
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
            while not (
                arrived.Test() or self.membership.dead or alone * _POLL > self._heartbeat_timeout
            ):
                time.sleep(_POLL)
                self.refresh_membership()
                alone += DEPARTED in self.membership.status
        except MPI.Exception as error:
            raise PeerLost(f"the other ranks cannot be reached: {error}") from error
        self.membership.publish_status(DEPARTED)
        stuck = not self._remote.close(timeout)
        if alone * _POLL > self._heartbeat_timeout:
            raise PeerLost("the others have given this rank up and left: windows cannot be freed")
        if stuck or self.membership.dead:
            raise PeerLost(
                f"ranks {sorted(self.membership.dead)} are gone: windows cannot be freed"
            )
        self._slots.close()
        self._words.close()


def _words(
    comm: MPI.Intracomm, node: MPI.Intracomm, count: int, mode: str
) -> NodeWords | WindowWords:
    """Make the control words: by the processor's atomics if all ranks share memory, else by MPI's."""
    library = native.load()
    shared = mode != "rma" and node.size == comm.size and library is not None
    if comm.allreduce(shared, MPI.LAND):
        assert library is not None
        return NodeWords(comm, count, library)
    return WindowWords(comm, count)


class _Condition:
    """Done when a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.test = condition


class _VersionedRead(ReadRequest):
    """A version of a rank of this node, looked for whenever somebody asks whether it is there."""

    def __init__(self, rank: int, look: Callable[[_VersionedRead], None], version: int) -> None:
        super().__init__(rank)
        self.version = version
        self._look = look

    def test(self) -> bool:
        if not self.is_settled:
            self._look(self)
        return self.is_settled
