"""Endpoint: all that an algorithm sees of the other ranks, on real windows or on a virtual clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox, Reservation
from mpi_dasgd.transport.publication import Claim, Publication

__all__ = ["Endpoint", "Pairing", "Pending", "meet"]


class Pending(Protocol):
    """Something that completes later."""

    def done(self) -> bool:
        """Return whether it is complete; never waits."""


class Pairing:
    """One attempt to exchange with a neighbour: its publication pinned and a slot of its inbox reserved.

    Attributes:
        settled: whether the attempt has ended, with a partner or without.
        theirs: the partner's publication, readable until the pairing is completed or abandoned,
            or None if there is no partner.
        reply: where to write the partner's delta.
        failed: candidates that were taken or full.
    """

    def __init__(self) -> None:
        self.settled = False
        self.failed = 0
        self.theirs: Message | None = None
        self.reply: Message | None = None
        self.claim: Claim | None = None
        self.reservation: Reservation | None = None

    def done(self) -> bool:
        """Return whether the attempt has ended, as `Pending` has it."""
        return self.settled

    def settle(
        self, claim: Claim, reservation: Reservation, theirs: Message | None, reply: Message | None
    ) -> None:
        """End the attempt with a partner."""
        self.claim, self.reservation, self.theirs, self.reply = claim, reservation, theirs, reply
        self.settled = True


def meet(publication: Publication, inbox: Inbox, rank: int) -> tuple[Claim, Reservation] | None:
    """Claim the publication of `rank` and a slot of its inbox, both or neither."""
    claim = publication.claim(rank)
    if claim is None:
        return None
    reservation = inbox.reserve(rank)
    if reservation is None:
        publication.release(claim)
        return None
    return claim, reservation


class Endpoint(ABC):
    """One rank's transport.

    Attributes:
        rank, size: this rank, and how many there are.
        publication: own publication, and readable ones of others.
        inbox: own inbox.
        counters: what was done in the compute thread; `totals` has all.
    """

    rank: int
    size: int
    publication: Publication
    inbox: Inbox
    counters: Counters

    @abstractmethod
    def neighbours(self) -> Sequence[int]:
        """Return the neighbours that live."""

    @abstractmethod
    def pair(self, candidates: Sequence[int]) -> Pairing:
        """Try to pair with one of `candidates`, in this order. Never waits: see `Pairing.settled`."""

    @abstractmethod
    def immediate(self, rank: int) -> bool:
        """Return whether pairing with `rank` settles at once."""

    @abstractmethod
    def complete(self, pairing: Pairing) -> None:
        """Deliver the reply of a settled pairing, then release the partner's publication."""

    @abstractmethod
    def abandon(self, pairing: Pairing) -> None:
        """Give back what a settled pairing holds, without an exchange."""

    @abstractmethod
    def allreduce(self, array: np.ndarray) -> Pending:
        """Replace `array` by its sum over all ranks, in place, by the time the result is done."""

    @abstractmethod
    def delivered(self) -> bool:
        """Return whether all that was completed or abandoned has reached the others."""

    @abstractmethod
    def time_ns(self) -> int:
        """Return the time, comparable between ranks, in nanoseconds."""

    @abstractmethod
    def totals(self) -> Counters:
        """Return the counts of all threads together."""
