"""Words and slots of a few ranks in one process, with a trace of all that is done to the words.

Between any two operations of a rank another one may act: so one thread plays the interleavings of
many, the same ones on any implementation of the protocols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.control_words import WordMap
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.rma.native_inbox import NativeInbox
from mpi_dasgd.transport.rma.native_publication import NativePublication
from mpi_dasgd.transport.rma.native_rank import NativeRank, WordHooks
from mpi_dasgd.transport.rma.peer_views import PeerViews

__all__ = ["TracedMemory"]

_MAX_DEPTH = 3  # ranks that are in the middle of something, at most


class TracedMemory:
    """`Words` and `Slots` of all ranks.

    Args:
        layout: layout of every message.
        size: number of ranks.
        publication_slots, inbox_slots: number of slots per rank.
        library: the native library to use; None: that of the package.

    Attributes:
        trace: reads as (rank, index, value), swaps as (rank, index, expected, new, whether it
            succeeded), fences as ().
        plan: what happens before the n-th operation from now on, by n from 1.
    """

    def __init__(
        self,
        layout: Layout,
        size: int,
        publication_slots: int = 4,
        inbox_slots: int = 4,
        library: Any = None,
    ) -> None:
        self.layout = layout
        self.word_map = WordMap(publication_slots, inbox_slots)
        self.words = np.zeros((size, self.word_map.count), np.int64)
        count = publication_slots + inbox_slots
        memory = np.zeros(size * count * layout.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.payload = memory[start : start + size * count * layout.nbytes]
        self._slots = self.payload.reshape(size, count, layout.nbytes)
        self._messages = [[Message(slot, layout) for slot in slots] for slots in self._slots]
        self._library = library or native.load()
        self.trace: list[tuple[Any, ...]] = []
        self.plan: dict[int, Callable[[], None]] = {}
        self._count = self._depth = 0

    def begin(self, plan: dict[int, Callable[[], None]]) -> None:
        """Begin a new trace."""
        self.trace, self.plan, self._count = [], plan, 0

    def _before(self) -> None:
        self._count += 1
        act = self.plan.pop(self._count, None)
        if act is not None and self._depth < _MAX_DEPTH:
            self._depth += 1
            act()
            self._depth -= 1

    def read(self, rank: int, index: int) -> int:
        self._before()
        value = int(self.words[rank, index])
        self.trace.append((rank, index, value))
        return value

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        self._before()
        done = int(self.words[rank, index]) == expected
        if done:
            self.words[rank, index] = new
        self.trace.append((rank, index, expected, new, done))
        return done

    def fence(self) -> None:
        self._before()
        self.trace.append(())

    def view(self, rank: int, index: int) -> Message:
        return self._messages[rank][index]

    def get(self, rank: int, index: int, out: Message) -> None:
        out.buffer[:] = self.view(rank, index).buffer

    def put(self, rank: int, index: int, message: Message) -> None:
        self.view(rank, index).buffer[:] = message.buffer

    def flip(self, chance: int) -> None:
        """Change a bit in the body of some message."""
        slots = self._slots.reshape(-1, self.layout.nbytes)
        slot = slots[chance % len(slots), self.layout.envelope_nbytes :]
        slot[chance // 7 % slot.size] ^= 1 << chance // 3 % 8

    def python_views(self, rank: int, max_claims: int = 2) -> PeerViews:
        """Return the protocols of a rank in Python."""
        counters = Counters()
        shared = self, self, self.word_map, rank, counters
        return PeerViews(Publication(*shared, max_claims), Inbox(*shared), counters)

    def native_rank(self, rank: int, max_claims: int = 2, *, traced: bool = True) -> NativeRank:
        """Return the native state of a rank; its operations are traced if wanted."""
        size = len(self.words)
        return NativeRank(
            self._library,
            rank,
            [self.words[r].ctypes.data for r in range(size)],
            [self._slots[r].ctypes.data for r in range(size)],
            self.layout.nbytes,
            self.word_map,
            Counters(),
            max_claims,
            WordHooks(self.read, self.swap, self.fence) if traced else None,
        )

    def native_views(self, rank: int, max_claims: int = 2) -> PeerViews:
        """Return the protocols of a rank in native code."""
        state = self.native_rank(rank, max_claims)
        shared = state, self, self, self.word_map, rank
        return PeerViews(NativePublication(*shared), NativeInbox(*shared), state.counters)
