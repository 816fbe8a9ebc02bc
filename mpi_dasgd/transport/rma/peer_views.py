"""One thread's own access to the publications and inboxes of all ranks."""

from __future__ import annotations

from typing import NamedTuple

from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication

__all__ = ["PeerViews"]


class PeerViews(NamedTuple):
    """What one thread uses, and no other: two threads never share an object that changes.

    Attributes:
        publication: access to the publications of other ranks.
        inbox: access to the inboxes of other ranks.
        counters: what both count.
    """

    publication: Publication
    inbox: Inbox
    counters: Counters
