"""Counters of a rank's transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

__all__ = ["Counters"]


@dataclass(slots=True)
class Counters:
    """Counts since the start of a run.

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

    messages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    absorbed: int = 0
    publications: int = 0
    publications_skipped: int = 0
    claims_lost: int = 0
    inbox_full: int = 0
    torn_reads: int = 0
    skipped: int = 0

    @classmethod
    def total(cls, counters: Sequence[Counters]) -> Counters:
        """Return the sum of the counts of several threads."""
        names = [field.name for field in fields(cls)]
        return cls(*(sum(getattr(counts, name) for counts in counters) for name in names))
