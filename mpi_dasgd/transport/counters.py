"""Counters of a rank's transport."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

__all__ = ["Counters"]

_NAMES = (
    "messages", "bytes_sent", "bytes_received", "absorbed", "publications",
    "publications_skipped", "claims_lost", "inbox_full", "torn_reads", "skipped",
)  # fmt: skip


class Counters(ctypes.Structure):
    """Counts since the start of a run; the native protocols count in the same memory.

    Mirror of MpdTransportCounters of ``node_rank.h``.

    Attributes:
        messages: messages delivered to other ranks' inboxes.
        bytes_sent: bytes of these messages, sent by Put or written in place.
        bytes_received: bytes of publications, fetched by Get or read in place.
        absorbed: messages taken out of the own inbox.
        publications: versions published.
        publications_skipped: versions not published because no slot was free.
        claims_lost: claims that failed because another rank had claimed the version.
        inbox_full: reservations that failed because the inbox was full.
        torn_reads: copies of a publication that was replaced during the copy.
        skipped: exchanges for which no partner was found.
    """

    messages: int
    bytes_sent: int
    bytes_received: int
    absorbed: int
    publications: int
    publications_skipped: int
    claims_lost: int
    inbox_full: int
    torn_reads: int
    skipped: int
    _fields_ = tuple((name, ctypes.c_int64) for name in _NAMES)

    @classmethod
    def total(cls, counters: Sequence[Counters]) -> Counters:
        """Return the sum of the counts of several threads."""
        return cls(*(sum(getattr(counts, name) for counts in counters) for name in _NAMES))

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {name: getattr(self, name) for name in _NAMES}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counters) and self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{name}={n}' for name, n in self.as_dict().items())})"
