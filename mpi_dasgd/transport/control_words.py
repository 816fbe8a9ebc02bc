"""Control words: 64-bit integers that any rank may read, and change by compare-and-swap only.

The word of a slot is ``version << 22 | holder << 2 | state``: 40 bits of version, 20 of rank, 2 of
state.
"""

from __future__ import annotations

from typing import Protocol

__all__ = [
    "ACTIVITY",
    "CALL",
    "CHECKSUM",
    "CLAIMED",
    "ERROR_REPORTER",
    "FREE",
    "GRADIENTS",
    "HEAD",
    "HEARTBEAT",
    "LAST_STEP",
    "READY",
    "SAMPLES",
    "SHARDS",
    "STATUS",
    "WordMap",
    "Words",
    "pack_slot_word",
]

FREE, READY, CLAIMED = range(3)
"""States of a slot. READY is `published` for a publication and `message complete` for an inbox."""

HEARTBEAT, SAMPLES, STATUS, LAST_STEP, ERROR_REPORTER = range(5)
GRADIENTS, ACTIVITY, SHARDS, HEAD, CALL, CHECKSUM = range(5, 11)
"""Indices of a rank's words.

Heartbeats; samples processed; status; last step; whether some rank reports why the run failed (only
rank 0's word counts); gradients computed, which is the newest step begun; activity
(`activity.py`); how the data are shared (`training/sampler.py`), 0 before that; newest publication;
collective call that the rank is in (`training/collective_calls.py`); checksum of its model
(`training/replica_check.py`).
"""

_FIRST_SLOT = CHECKSUM + 1

MAX_RANKS = 1 << 20


def pack_slot_word(state: int, holder: int = 0, version: int = 0) -> int:
    """Return the word of a slot."""
    return version << 22 | holder << 2 | state


def holder_of(value: int) -> int:
    """Return the rank in the word of a slot."""
    return value >> 2 & (MAX_RANKS - 1)


class WordMap:
    """Indices of one rank's slot words.

    Args:
        publication_slots: number of slots of a publication.
        inbox_slots: number of slots of an inbox.

    Attributes:
        publication: indices of the words of the publication's slots.
        inbox: indices of the words of the inbox's slots.
        count: number of words per rank.
    """

    def __init__(self, publication_slots: int, inbox_slots: int) -> None:
        self.publication = range(_FIRST_SLOT, _FIRST_SLOT + publication_slots)
        self.inbox = range(self.publication.stop, self.publication.stop + inbox_slots)
        self.count = self.inbox.stop


class Words(Protocol):
    """The control words of all ranks."""

    def read(self, rank: int, index: int) -> int:
        """Return word `index` of `rank`, atomically.

        Raises:
            Unreachable: the rank is gone.
        """

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        """Set a word to `new` if it is `expected`, atomically; return whether it was.

        Raises:
            Unreachable: the rank is gone.
        """
