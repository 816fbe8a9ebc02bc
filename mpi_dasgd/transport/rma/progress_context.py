"""State owned by one progress thread.

A stalled thread keeps its own; its replacement gets a fresh one, so the two never share mutable
objects.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.transport.control_words import Words
from mpi_dasgd.transport.membership import Membership
from mpi_dasgd.transport.rma.peer_views import PeerViews
from mpi_dasgd.transport.rma.progress_thread import ProgressThread

__all__ = ["ProgressContext"]

_JOIN_SECONDS = 0.5  # for a superseded thread to end: all is delivered by then


class ProgressContext:
    """State owned by one progress thread.

    A thread that is stalled in a call is superseded, and keeps its context: it may only finish what
    concerns its current peer, which is *quarantined* for its successors until then. So no two
    threads ever deal with the same rank, and state that is kept per rank may be shared.

    Args:
        rank: this rank, the first current peer.
        views: publications and inboxes, for this thread alone.
        layout: layout of every message.
        predecessor: context of the thread that is superseded; None for the first thread.

    Attributes:
        thread: thread that owns this context; set by the owner of both.
        current_peer: rank that the thread is talking to; this rank if to none.
        superseded: whether another thread has replaced this one; changes under a lock.
        on_supersede: callback that settles the current request if this thread is replaced.
    """

    thread: ProgressThread

    def __init__(
        self,
        rank: int,
        views: PeerViews,
        layout: Layout,
        predecessor: ProgressContext | None = None,
    ) -> None:
        self.publication, self.inbox, self.counters = views
        self.current_peer = rank
        self.superseded = False
        self.on_supersede: Callable[[], None] | None = None
        self._rank = rank
        self._lock = threading.Lock()
        self._layout = layout
        self._buffers: dict[str, Message] = {}
        self._predecessors: tuple[ProgressContext, ...] = ()
        if predecessor is not None:
            self._predecessors = (*predecessor._stalled, predecessor)

    def buffer(self, purpose: str) -> Message:
        """Return the staging buffer of that name."""
        if purpose not in self._buffers:
            empty = np.empty(self._layout.nbytes, np.uint8)
            self._buffers[purpose] = Message(empty, self._layout)
        return self._buffers[purpose]

    def switch_to(self, rank: int) -> bool:
        """Make `rank` the current peer; return False if the thread is superseded and must end."""
        with self._lock:
            if not self.superseded:
                self.current_peer = rank
            return not self.superseded

    def iterate_peers(self, ranks: Iterable[int]) -> Iterator[int]:
        """Yield one of `ranks` after the other as current peer, until the thread is superseded."""
        for rank in ranks:
            if not self.switch_to(rank):
                return
            yield rank

    def exchange_heartbeats(self, membership: Membership, words: Words) -> None:
        """Send this rank's heartbeat and poll the other ranks: the thread's periodic task."""
        if self.switch_to(self._rank):
            membership.send_heartbeat(words)
        ranks = range(len(membership.status))
        membership.detect_failures(self.iterate_peers(ranks), words, self.quarantined)

    def begin_request(self, on_supersede: Callable[[], None]) -> bool:
        """Start to work on a request; return False if its successor has to do that.

        Args:
            on_supersede: callback that settles the request if this thread is replaced.
        """
        with self._lock:
            if not self.superseded:
                self.on_supersede = on_supersede
            return not self.superseded

    @contextlib.contextmanager
    def publish_result(self) -> Iterator[bool]:
        """Yield whether this thread may still publish its result.

        If False, `on_supersede` settles the request.
        """
        with self._lock:
            if not self.superseded:
                self.on_supersede = None
            yield not self.superseded

    def supersede(self) -> None:
        """Mark the thread as replaced; the caller starts a successor, then calls `on_supersede`."""
        with self._lock:
            self.superseded = True

    def stalled_peer(self, stall_timeout: float) -> int | None:
        """Return the rank that has blocked the thread for over `stall_timeout` seconds, or None.

        Blocked on this rank itself it waits for MPI as a whole, as a successor would: that is None.
        """
        if self.thread.busy_seconds <= stall_timeout:
            return None
        peer = self.current_peer
        return None if peer == self._rank else peer

    def check(self) -> None:
        """Raise what failed in the thread, or in a stalled one before it."""
        for context in (self, *self._predecessors):
            context.thread.check()

    @property
    def _stalled(self) -> tuple[ProgressContext, ...]:
        return tuple(context for context in self._predecessors if context.thread.alive)

    @property
    def quarantined(self) -> set[int]:
        """Ranks that superseded threads are still blocked on."""
        return {context.current_peer for context in self._stalled}

    def close(self, timeout: float) -> bool:
        """End the thread; return False if it, or one before it, is stalled."""
        ended = self.thread.close(timeout)
        return ended and all(context.thread.close(_JOIN_SECONDS) for context in self._stalled)
