"""Shared memory of virtual ranks: control words and payload slots in plain lists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.transport.control_words import WordMap

__all__ = ["SharedMemory"]


class SharedMemory:
    """The control words and payload slots of all virtual ranks: `Words` and `Slots` in one.

    Args:
        layout: layout of every message.
        size: number of ranks.
        publication_slots, inbox_slots: number of slots per rank.

    Attributes:
        on_write: called as ``on_write(rank, index, value)`` after a word has changed.
    """

    def __init__(
        self, layout: Layout, size: int, publication_slots: int = 4, inbox_slots: int = 4
    ) -> None:
        self.layout = layout
        self.word_map = WordMap(publication_slots, inbox_slots)
        self.on_write: Callable[[int, int, int], None] | None = None
        self._words = [[0] * self.word_map.count for _ in range(size)]
        self._slots_per_rank = publication_slots + inbox_slots
        self._messages: dict[int, Message] = {}

    def read(self, rank: int, index: int) -> int:
        return self._words[rank][index]

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        words = self._words[rank]
        if words[index] != expected:
            return False
        words[index] = new
        if self.on_write is not None:
            self.on_write(rank, index, new)
        return True

    def view(self, rank: int, index: int) -> Message:
        key = rank * self._slots_per_rank + index
        message = self._messages.get(key)
        if message is None:  # slots that are never used take no memory
            buffer = np.zeros(self.layout.nbytes, np.uint8)
            message = self._messages[key] = Message(buffer, self.layout)
        return message

    def get(self, rank: int, index: int, out: Message) -> None:
        out.buffer[:] = self.view(rank, index).buffer

    def put(self, rank: int, index: int, message: Message) -> None:
        self.view(rank, index).buffer[:] = message.buffer

    def fence(self) -> None:
        """Do nothing: there is one thread."""
