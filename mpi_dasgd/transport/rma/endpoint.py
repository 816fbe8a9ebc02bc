"""The endpoint on MPI windows: in place within a node, by a progress thread between nodes."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import methodcaller
from typing import cast

import numpy as np
from mpi4py import MPI

from mpi_dasgd.codecs import Codec, Layout
from mpi_dasgd.config.schema import TransportConfig
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.device.run_ahead import RunAhead
from mpi_dasgd.errors import PeerLost
from mpi_dasgd.kernels import native
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.control_words import WordMap
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.endpoint import (
    Endpoint,
    ExchangeRequest,
    PairExchanges,
    ReadRequest,
    Request,
    SendBuffer,
)
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.membership import DEPARTED, Membership
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import Immediate, Release, await_release
from mpi_dasgd.transport.rma import teardown
from mpi_dasgd.transport.rma.allreduce import WatchedAllreduce
from mpi_dasgd.transport.rma.device_slots import DeviceSlots
from mpi_dasgd.transport.rma.launched_release import make_release
from mpi_dasgd.transport.rma.native_exchange import NativeExchange
from mpi_dasgd.transport.rma.native_inbox import NativeInbox
from mpi_dasgd.transport.rma.native_publication import NativePublication
from mpi_dasgd.transport.rma.native_rank import NativeRank
from mpi_dasgd.transport.rma.node_peers import NodePeers
from mpi_dasgd.transport.rma.peer_views import PeerViews
from mpi_dasgd.transport.rma.progress_context import ProgressContext
from mpi_dasgd.transport.rma.progress_engine import ProgressEngine
from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from mpi_dasgd.transport.rma.remote_peers import RemotePeers
from mpi_dasgd.transport.rma.shared_memory import NodeWords
from mpi_dasgd.transport.rma.step_words import StepWords
from mpi_dasgd.transport.rma.windows import WindowSlots, allocate_words

__all__ = ["RmaEndpoint"]

_HEARTBEAT_SECONDS = 0.05  # between heartbeats, and between polls of ranks of other nodes
_SWITCH_INTERVAL = 0.0005  # seconds by which a GIL holder delays the progress thread's answer
_MANY_RANKS = 128  # of a node, above which their gradients are not read at every step


class RmaEndpoint(Endpoint):
    """One rank's transport on MPI windows. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks; not used for anything else.
        layout: layout of every message.
        topology: graph of the ranks that may communicate.
        config: section ``transport`` of the configuration: memory, slots and timing.
        publication_slots: slots of a publication per rank, 0 for none; None: those of `config`.
        inbox_slots: slots of an inbox per rank, 0 for none; None: those of `config`.
        device: device of this rank; on all ranks of the same kind.
        memory: memory of the payload slots, the same on all ranks: ``host``, or ``ipc``.

    Raises:
        UserError: the native kernels are older than the program, and cannot serve a device.

    Attributes:
        begin_step: publishes how many gradients this rank has computed; returns those of all ranks.
        end_step: publishes how many samples this rank has processed; returns the gradients of all
            ranks.
    """

    begin_step: Callable[[int], int]
    end_step: Callable[[int], int]

    def __init__(
        self,
        comm: MPI.Intracomm,
        layout: Layout,
        topology: Topology,
        config: TransportConfig | None = None,
        *,
        publication_slots: int | None = None,
        inbox_slots: int | None = None,
        device: Device = HOST,
        memory: str = "host",
    ) -> None:
        config = config or TransportConfig()
        if publication_slots is None:
            publication_slots = config.publication_slots_in(memory)
        if inbox_slots is None:
            inbox_slots = config.inbox_slots
        self.rank, self.size = comm.rank, comm.size
        self.topology = topology
        self._inbox_slots = inbox_slots
        self._comm = comm
        self._heartbeat_timeout = config.heartbeat_timeout
        word_map = WordMap(publication_slots, inbox_slots)
        slot_count = publication_slots + inbox_slots
        node = cast(MPI.Intracomm, comm.Split_type(MPI.COMM_TYPE_SHARED))
        self._words = allocate_words(comm, node, word_map.count, config.mode)
        neighbours: Sequence[int] = topology.neighbours(self.rank)
        self._slots: WindowSlots | DeviceSlots = (
            WindowSlots(comm, node, layout, slot_count, config.mode)
            if memory == "host"
            else DeviceSlots(comm, layout, slot_count, device, neighbours)
        )
        node.Free()
        self._device = device
        self.release = make_release(comm, self._words, device)
        self.run_ahead = RunAhead(device, config.ahead)

        def new_views(sent: defaultdict[int, int], release: Release | None = None) -> PeerViews:
            counters = Counters()
            shared = self._words, self._slots, word_map, self.rank, counters
            publication = Publication(*shared, release=release)
            return PeerViews(publication, Inbox(*shared, sent, release), counters)

        self._native = self._native_rank(word_map)
        if self._native is None:
            views = new_views(defaultdict(int), self.release)
        else:
            of_node = self._native, self._words, self._slots, word_map, self.rank
            views = PeerViews(
                NativePublication(*of_node), NativeInbox(*of_node), self._native.counters
            )
        self.publication, self.inbox, self.counters = views
        self._node = NodePeers(views, self._slots)
        self.membership = Membership(self._words, self.rank, self.size, config.heartbeat_timeout)
        is_small = len(self._slots.node_ranks) <= _MANY_RANKS
        self._counted_ranks: Sequence[int] = self._slots.node_ranks if is_small else ()
        self._step_words = self._make_step_words()
        self._use_in_steps(self._step_words)
        self._neighbours = neighbours
        self._reclaimed: set[int] = set()  # dead ranks
        self._closed = False
        self._remote_ranks = frozenset(range(self.size)).difference(self._slots.node_ranks)
        if self._remote_ranks:
            sys.setswitchinterval(_SWITCH_INTERVAL)
        sent_to_remote: defaultdict[int, int] = defaultdict(int)

        def new_context(superseded: ProgressContext | None) -> ProgressContext:
            context = ProgressContext(self.rank, new_views(sent_to_remote), layout, superseded)
            context.thread = ProgressThread(
                self._poll_peers,
                _HEARTBEAT_SECONDS,
                # Not on COMM_SELF, where MPICH 5 makes no progress between hosts.
                comm.Iprobe if self._remote_ranks else None,
                config.progress_interval,
                (context,),
            )
            return context

        self._poll_peers = methodcaller("exchange_heartbeats", self.membership, self._words)
        self._engine = ProgressEngine(self.membership, new_context)
        self._remote = RemotePeers(self._slots, self.membership, self._engine)
        self._allreduce = WatchedAllreduce(
            comm,
            config.heartbeat_timeout,
            lambda: self.membership.dead | self._engine.stalled_peers(config.heartbeat_timeout),
        )

    def _native_rank(self, word_map: WordMap) -> NativeRank | None:
        """Return the native state of this rank; None: not all of it is in shared memory at once."""
        words, slots, library = self._words, self._slots, native.load()
        if not isinstance(words, NodeWords) or not isinstance(slots, WindowSlots):
            return None
        if library is None or not isinstance(self.release, Immediate):
            return None
        return NativeRank.on_node(library, self.rank, words, slots, word_map)

    def _make_step_words(self) -> StepWords | None:
        """Have the words of a step written and read by native calls, if they are in memory."""
        words, library = self._words, native.load()
        if library is None or not isinstance(words, NodeWords):
            return None
        counts_others = bool(self._counted_ranks)
        made = StepWords(library, words, self.rank, self.size, counts_others=counts_others)
        self.membership.use(made)
        return made

    def _use_in_steps(self, step_words: StepWords | None) -> None:
        if step_words is None:
            self.begin_step = partial(self.membership.begin_step, ranks=self._counted_ranks)
            self.end_step = partial(self.membership.end_step, ranks=self._counted_ranks)
        else:  # without a function between, which costs a microsecond in every step
            self.begin_step, self.end_step = step_words.begin_step, step_words.end_step

    @property
    def transfer_mode(self) -> str:
        """How payload is transferred, for users to read."""
        return self._slots.transfer_mode

    def refresh_membership(self) -> None:
        """Read the status of this node's ranks, and reclaim what ranks that died have claimed.

        Raises:
            BaseException: whatever failed in the progress thread.
        """
        self.membership.refresh(self._slots.node_ranks)
        # Stalled threads are replaced before the heartbeat of this rank itself is missed.
        self._remote.check(self._heartbeat_timeout / 3)
        for rank in self.membership.dead - self._reclaimed:
            self.publication.reclaim_from(rank)
            self.inbox.reclaim_from(rank)
            self._reclaimed.add(rank)
            if self._step_words is not None:
                self._step_words.forget(self._reclaimed)
            self._neighbours = self.topology.without(self._reclaimed).neighbours(self.rank)

    def refresh_progress(self) -> None:
        """Read activities and steps of this node's ranks; have those of others read soon."""
        self.membership.refresh_progress(self._slots.node_ranks)
        if self._remote_ranks and self._engine.idle:
            self._engine.submit(self._poll_peers)

    def neighbours(self) -> Sequence[int]:
        return self._neighbours

    def begin_exchange(self, candidates: Sequence[int]) -> ExchangeRequest:
        """Try to claim one of `candidates` as partner.

        Raises:
            RuntimeError: the transport is closed.
        """
        if self._closed:
            raise RuntimeError("transport is closed")
        request = ExchangeRequest()
        for position, rank in enumerate(candidates):
            if rank in self._remote_ranks:
                # Ranks of this node are not tried after it: the compute thread alone talks to them.
                self._remote.begin_exchange(
                    request, [r for r in candidates[position:] if r in self._remote_ranks]
                )
                return request
            if self._node.begin_exchange(request, rank):
                return request
            request.failed_attempts += 1
        request.is_settled = True
        return request

    def native_exchange(
        self, codec: Codec, weight: float, records: Callable[[], RecordRing]
    ) -> PairExchanges | None:
        state = codec.native_state()
        if self._native is None or state is None:
            return None
        ring = records()
        if ring.capacity <= self._inbox_slots:  # an exchange may have more rows
            return None
        return NativeExchange(self._native, self._slots, state, codec, weight, ring)

    def is_local(self, rank: int) -> bool:
        return rank not in self._remote_ranks

    def _peers(self, rank: int) -> NodePeers | RemotePeers:
        return self._remote if rank in self._remote_ranks else self._node

    def commit_exchange(self, request: ExchangeRequest) -> None:
        assert request.claim is not None
        self._peers(request.claim.rank).commit_exchange(request)

    def abort_exchange(self, request: ExchangeRequest) -> None:
        if request.claim is not None:
            self._peers(request.claim.rank).abort_exchange(request)

    def read(self, rank: int, version: int | None = None) -> ReadRequest:
        return self._peers(rank).read(rank, version)

    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        return self._peers(rank).acquire_send_buffer(rank)

    def send(self, buffer: SendBuffer) -> None:
        self._peers(buffer.rank).send(buffer)

    def wait_until(
        self, condition: Callable[[], bool], ranks: Iterable[int] | None = None
    ) -> Request:
        return _PolledCondition(condition)

    def gradients(self) -> int:
        """Return the number of gradients: of this node's ranks now, of others as last polled."""
        self.membership.refresh_gradients(self._counted_ranks)
        return sum(self.membership.gradients)

    def gradients_of(self, rank: int) -> int:
        if rank not in self._remote_ranks:
            self.membership.refresh_gradients((rank,))
        return self.membership.gradients[rank]

    def report_gradients(self, gradients: int) -> None:
        self.membership.report_gradients(gradients)

    def is_flushed(self) -> bool:
        return self._remote.is_flushed() and not self.release.is_pending

    def time_ns(self) -> int:
        return time.time_ns()

    def allreduce(self, array: np.ndarray) -> Request:
        return self._allreduce.begin(array)

    def total_counters(self) -> Counters:
        return Counters.total((self.counters, *self._engine.counters))

    def close(self, timeout: float = 10.0) -> None:
        """Wait for the other ranks, end the progress thread and free the windows, once.

        Raises:
            PeerFailed: a rank has failed.
            PeerLost: ranks have died, or have given this one up, so that the windows cannot be
                freed, and others may still read them; the process must end by `os._exit`.
            DeviceFailed: the device has failed.
        """
        if self._closed:
            return
        self._closed = True
        # No word and no slot may be freed that work of this rank still uses.
        with self._device.current_stream():
            self.flush()
            self._device.close()
            await_release(self.release)
        all_came = teardown.await_all(
            self._comm, self.membership, self.refresh_membership, self._heartbeat_timeout
        )
        self.membership.publish_status(DEPARTED)
        if not all_came:
            raise PeerLost("the others have given this rank up and left: windows cannot be freed")
        if self.membership.dead or not self._engine.close(timeout):
            raise PeerLost(
                f"ranks {sorted(self.membership.dead)} are gone: windows cannot be freed"
            )
        if self._native is not None:
            self._native.close()
        if self._step_words is not None:
            self._step_words.close()
            self._use_in_steps(self._step_words)
        teardown.free(self._slots, self._words, timeout=max(timeout, self._heartbeat_timeout))


class _PolledCondition:
    """A request that is complete when a condition holds, which its waiter polls."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.test = condition
