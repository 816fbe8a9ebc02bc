"""Hands: what one courier works with, so that a stuck one and its successor never share an object."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.rma.progress_thread import ProgressThread

__all__ = ["ProgressContext", "Views"]

Views = Callable[[Counters], tuple[Publication, Inbox]]
"""Makes views of publications and inboxes that count in the given counters."""

_JOIN_SECONDS = 0.5  # seconds for a courier that was left behind to end: all is delivered by then


class ProgressContext:
    """What one courier works with.

    A courier that is stuck in a call is left behind, with its hands: it may only finish what concerns
    the rank that it attends, which its successors *avoid* until then. So no two threads ever deal
    with the same rank, and what is kept per rank may be shared.

    Args:
        rank: this rank, which it attends at first.
        views, layout: see `RemotePeers`.
        predecessor: hands of the courier that is left behind, if there was one.

    Attributes:
        current_peer: rank that the thread is talking to.
        superseded: whether the courier was left behind; changes under a lock.
        on_supersede: callback that settles the current request if this thread is replaced.
        thread: thread that owns this state.
    """

    thread: ProgressThread

    def __init__(
        self, rank: int, views: Views, layout: Layout, predecessor: ProgressContext | None = None
    ) -> None:
        self.current_peer = rank
        self.superseded = False
        self._lock = threading.Lock()
        self.on_supersede: Callable[[], None] | None = None
        self.counters = Counters()
        self.publication, self.inbox = views(self.counters)
        self._layout = layout
        self._messages: dict[str, Message] = {}
        self._predecessors: tuple[ProgressContext, ...] = ()
        if predecessor is not None:
            self._predecessors = (*predecessor._stalled, predecessor)

    def message(self, purpose: str) -> Message:
        """Return the staging area of that name."""
        if purpose not in self._messages:
            empty = np.empty(self._layout.nbytes, np.uint8)
            self._messages[purpose] = Message(empty, self._layout)
        return self._messages[purpose]

    def switch_to(self, rank: int) -> bool:
        """Turn to `rank`; return False if the courier was left behind and must end."""
        with self._lock:
            if not self.superseded:
                self.current_peer = rank
            return not self.superseded

    def iterate_peers(self, ranks: Iterable[int]) -> Iterator[int]:
        """Visit one of `ranks` after the other."""
        for rank in ranks:
            if not self.switch_to(rank):
                return
            yield rank

    def begin_request(self, on_supersede: Callable[[], None]) -> bool:
        """Take up a question; return False if the courier was left behind: ask its successor then."""
        with self._lock:
            if not self.superseded:
                self.on_supersede = on_supersede
            return not self.superseded

    @contextlib.contextmanager
    def publish_result(self) -> Iterator[bool]:
        """Yield whether this thread may publish its result; else `on_supersede` has settled the request."""
        with self._lock:
            if not self.superseded:
                self.on_supersede = None
            yield not self.superseded

    def supersede(self) -> None:
        """Leave the courier behind; the caller sees to its successor, then calls `on_supersede`."""
        with self._lock:
            self.superseded = True

    def check(self) -> None:
        """Raise here what failed in the courier, or in one before it that was stuck."""
        for hands in (self, *self._predecessors):
            hands.thread.check()

    @property
    def _stalled(self) -> tuple[ProgressContext, ...]:
        return tuple(hands for hands in self._predecessors if hands.thread.alive)

    @property
    def quarantined(self) -> set[int]:
        """Ranks with which couriers before this one are stuck."""
        return {hands.current_peer for hands in self._stalled}

    def close(self, timeout: float) -> bool:
        """End the courier; return False if it, or one before it, is stuck."""
        ended = self.thread.close(timeout)
        return ended and all(hands.thread.close(_JOIN_SECONDS) for hands in self._stalled)
