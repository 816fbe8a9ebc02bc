"""Endpoint: all that an algorithm sees of the other ranks, on real windows or on a virtual clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpi_dasgd.codecs import Message
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox, Reservation
from mpi_dasgd.transport.publication import Claim, Publication

__all__ = [
    "Endpoint",
    "ExchangeRequest",
    "ReadRequest",
    "Request",
    "SendBuffer",
    "claim_and_reserve",
]


class Request(Protocol):
    """Something that completes later."""

    def test(self) -> bool:
        """Return whether it is complete; never waits."""


class ExchangeRequest:
    """One attempt to exchange with a neighbour: its publication pinned and a slot of its inbox reserved.

    Attributes:
        is_settled: whether the attempt has ended, with a partner or without.
        partner_model: the partner's publication, readable until the exchange is committed or aborted,
            or None if there is no partner.
        partner_delta: where to write the partner's delta.
        failed_attempts: candidates that were taken or full.
    """

    def __init__(self) -> None:
        self.is_settled = False
        self.failed_attempts = 0
        self.partner_model: Message | None = None
        self.partner_delta: Message | None = None
        self.claim: Claim | None = None
        self.reservation: Reservation | None = None

    def test(self) -> bool:
        """Return whether the attempt has ended, as `Request` has it."""
        return self.is_settled

    def settle(
        self,
        claim: Claim,
        reservation: Reservation,
        partner_model: Message | None,
        partner_delta: Message | None,
    ) -> None:
        """End the attempt with a partner."""
        self.claim, self.reservation, self.partner_model, self.partner_delta = (
            claim,
            reservation,
            partner_model,
            partner_delta,
        )
        self.is_settled = True


class ReadRequest:
    """A publication asked for, to be read without a claim.

    Attributes:
        is_settled: whether the attempt has ended.
        rank: whose publication it is.
        message: the publication, readable until the next `Endpoint.read`, or None if there was none.
    """

    def __init__(self, rank: int) -> None:
        self.is_settled = False
        self.rank = rank
        self.message: Message | None = None

    def test(self) -> bool:
        """Return whether the attempt has ended, as `Request` has it."""
        return self.is_settled


@dataclass(frozen=True)
class SendBuffer:
    """A message to be written for `rank`, then given to `Endpoint.deliver`."""

    rank: int
    message: Message
    reservation: Reservation | None = None


def claim_and_reserve(
    publication: Publication, inbox: Inbox, rank: int
) -> tuple[Claim, Reservation] | None:
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
        topology: who may talk to whom, dead ranks included.
        counters: what was done in the compute thread; `totals` has all.
    """

    rank: int
    size: int
    publication: Publication
    inbox: Inbox
    topology: Topology
    counters: Counters

    @abstractmethod
    def neighbours(self) -> Sequence[int]:
        """Return the neighbours that live."""

    @abstractmethod
    def begin_exchange(self, candidates: Sequence[int]) -> ExchangeRequest:
        """Try to exchange with one of `candidates`, in this order. Never waits."""

    @abstractmethod
    def is_local(self, rank: int) -> bool:
        """Return whether pairing with `rank` settles at once."""

    @abstractmethod
    def commit_exchange(self, pairing: ExchangeRequest) -> None:
        """Deliver the reply of a settled pairing, then release the partner's publication."""

    @abstractmethod
    def abort_exchange(self, pairing: ExchangeRequest) -> None:
        """Give back what a settled pairing holds, without an exchange."""

    @abstractmethod
    def read(self, rank: int, version: int | None = None) -> ReadRequest:
        """Ask for the publication of `rank`, the newest or a given version. Never waits.

        The newest is a copy, whatever the owner does meanwhile; `ReadRequest.message` is None if there
        is none. A given version (1, 2, ...) settles when it is there, and is only safe if its owner
        publishes nothing two versions newer before this rank has read it.
        """

    @abstractmethod
    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        """Return a message to write for the inbox of `rank`, or None if there is no room. Never waits."""

    @abstractmethod
    def send(self, posting: SendBuffer) -> None:
        """Send a buffer, written and stamped: it arrives exactly once, in order."""

    @abstractmethod
    def wait_until(
        self, condition: Callable[[], bool], ranks: Iterable[int] | None = None
    ) -> Request:
        """Return what is done when `condition` holds.

        Args:
            condition: depends on control words only.
            ranks: whose words; None for one's own.
        """

    @abstractmethod
    def gradients(self) -> int:
        """Return how many gradients all ranks have computed, as far as this one knows."""

    @abstractmethod
    def gradients_of(self, rank: int) -> int:
        """Return how many gradients `rank` has computed: all, once it is known to have finished."""

    @abstractmethod
    def report_gradients(self, gradients: int) -> None:
        """Tell the others how many gradients this rank has computed."""

    @abstractmethod
    def allreduce(self, array: np.ndarray) -> Request:
        """Replace `array` by its sum over all ranks, in place, by the time the result is done."""

    @abstractmethod
    def is_flushed(self) -> bool:
        """Return whether all that was completed or abandoned has reached the others."""

    @abstractmethod
    def time_ns(self) -> int:
        """Return the time, comparable between ranks, in nanoseconds."""

    @abstractmethod
    def total_counters(self) -> Counters:
        """Return the counts of all threads together."""
