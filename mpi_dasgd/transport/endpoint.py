"""Endpoint: all that an algorithm sees of the other ranks, on real windows or on a virtual clock.

One exchange, in order. Control words change by compare-and-swap only, and no step waits for the
partner's program; `publication.py` and `inbox.py` have the states of the words.

1. `Endpoint.begin_exchange` tries one candidate after the other (`claim_and_reserve`): read its
   head word, which names the newest version and its slot; swap that slot's word READY(version) ->
   CLAIMED(this rank), which pins the version for this exchange; swap the word of an inbox slot FREE
   -> CLAIMED(this rank). If the inbox is full, release the claim. On one node the request settles
   at once. Between nodes the progress thread does this, copies the publication by Get, and settles
   the request; the algorithm polls `ExchangeRequest.test`.
2. `Codec.average_pair` reads `partner_model`, changes the own model, and writes to `partner_delta`
   what the partner has to add, so that the sum of both models is kept. In the same pass it can
   encode the new own model into the slot of `Publication.reserve`. No control word changes.
3. `Endpoint.commit_exchange` moves the delta to the inbox (in place already, or by Put), then swaps
   the inbox word CLAIMED -> READY(this rank), then the publication's word CLAIMED -> FREE(version).
   `Endpoint.abort_exchange` swaps both words to FREE instead, in the same order.
4. `Publication.publish` swaps the word of the reserved slot FREE -> READY(version + 1), then the
   own head word, then the word of the version before READY -> FREE, unless a reader has claimed
   that one.
5. The partner, in a later step of its own, finds the inbox word READY (`Inbox.receive`), adds the
   delta to its model, and swaps the word READY -> FREE (`Inbox.free`).

Where the codec works on a device that is behind the host, the swaps of 3, 4 and 5 wait in
`Endpoint.release` until the device has passed the work that was asked for before them; those of
`begin_exchange` and `abort_exchange` are made at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.device.run_ahead import RunAhead
from mpi_dasgd.kernels.optimizer import OptimizerStep
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.inbox import Inbox, Reservation
from mpi_dasgd.transport.publication import Claim, Publication
from mpi_dasgd.transport.release import Release

__all__ = [
    "Endpoint",
    "ExchangeRequest",
    "PairExchanges",
    "ReadRequest",
    "Request",
    "SendBuffer",
    "claim_and_reserve",
]


class Request(Protocol):
    """A pending operation."""

    def test(self) -> bool:
        """Return whether the operation is complete. Never waits."""


class ExchangeRequest:
    """An attempt to claim a neighbour's publication together with a slot of its inbox.

    Attributes:
        is_settled: whether the attempt has ended, with a partner or without.
        partner_model: the partner's publication, readable until the exchange is committed or
            aborted; None if there is no partner.
        partner_delta: message to write the partner's delta to; None if there is no partner.
        failed_attempts: number of candidates whose version was claimed or whose inbox was full.
        claim: the claimed version; None if there is no partner.
        reservation: the claimed slot of the partner's inbox; None if there is no partner.
    """

    def __init__(self) -> None:
        self.is_settled = False
        self.failed_attempts = 0
        self.partner_model: Message | None = None
        self.partner_delta: Message | None = None
        self.claim: Claim | None = None
        self.reservation: Reservation | None = None

    def test(self) -> bool:
        """Return whether the attempt has ended."""
        return self.is_settled

    def settle(
        self,
        claim: Claim,
        reservation: Reservation,
        partner_model: Message | None,
        partner_delta: Message | None,
    ) -> None:
        """End the attempt with a partner."""
        self.claim, self.reservation = claim, reservation
        self.partner_model, self.partner_delta = partner_model, partner_delta
        self.is_settled = True


class ReadRequest:
    """An attempt to read a publication without claiming it.

    Attributes:
        is_settled: whether the attempt has ended.
        rank: owner of the publication.
        message: the publication, readable until the next `Endpoint.read`; None if there was none.
    """

    def __init__(self, rank: int) -> None:
        self.is_settled = False
        self.rank = rank
        self.message: Message | None = None

    def test(self) -> bool:
        """Return whether the attempt has ended."""
        return self.is_settled


class PairExchanges(Protocol):
    """Pair exchanges as `algorithms.pair_averaging.PairExchange` has them made where it can."""

    def exchange(
        self,
        y: np.ndarray,
        step: int,
        candidates: Sequence[int],
        *,
        publish_result: bool,
        update: OptimizerStep | None = None,
    ) -> None:
        """Absorb, average with one of `candidates`, and publish if wanted."""

    def absorb(self, y: np.ndarray, step: int, *, publish_result: bool = False) -> int:
        """Apply the received deltas, and publish if wanted; return their number."""

    def publish(self, y: np.ndarray, step: int, update: OptimizerStep | None = None) -> bool:
        """Publish; return whether a slot was free."""


@dataclass(frozen=True)
class SendBuffer:
    """A message to write, then to pass to `Endpoint.send`.

    Attributes:
        rank: receiver.
        message: where to write.
        reservation: slot of the receiver's inbox that `message` is in; None for a staging buffer.
    """

    rank: int
    message: Message
    reservation: Reservation | None = None


def claim_and_reserve(
    publication: Publication, inbox: Inbox, rank: int
) -> tuple[Claim, Reservation] | None:
    """Claim the newest version of `rank` and a slot of its inbox: both, or None."""
    claim = publication.claim(rank)
    if claim is None:
        return None
    reservation = inbox.reserve(rank)
    if reservation is None:
        publication.give_back(claim)
        return None
    return claim, reservation


class Endpoint(ABC):
    """One rank's transport. Subclasses inherit the documentation of its methods.

    Attributes:
        rank: this rank.
        size: number of ranks.
        publication: own publication, and access to those of ranks in reach.
        inbox: own inbox, and access to those of ranks in reach.
        topology: graph of the ranks that may communicate, dead ranks included.
        counters: counts of the compute thread; `total_counters` adds those of other threads.
        release: makes the swaps of the compute thread that give memory away.
        run_ahead: how far this rank's program may be ahead of its device.
    """

    rank: int
    size: int
    publication: Publication
    inbox: Inbox
    topology: Topology
    counters: Counters
    release: Release
    run_ahead: RunAhead

    def flush(self) -> None:
        """Have what was given away so far reach the others once the device is done with it.

        Drivers call it at the end of a step, and before they wait. In host memory all has reached
        them already.

        Raises:
            DeviceFailed: the device has failed.
            RuntimeError: a control word was not what the protocol makes it.
        """
        self.release.flush()

    def catch_up(self) -> None:
        """Wait until the device is near enough for this rank to claim a model; see `RunAhead`.

        Raises:
            DeviceFailed: the device has failed.
        """
        self.run_ahead.catch_up()

    @abstractmethod
    def neighbours(self) -> Sequence[int]:
        """Return the living neighbours."""

    @abstractmethod
    def begin_exchange(self, candidates: Sequence[int]) -> ExchangeRequest:
        """Try to claim one of `candidates` as partner, in this order. Never waits: poll `test`."""

    @abstractmethod
    def is_local(self, rank: int) -> bool:
        """Return whether an exchange with `rank` settles at once."""

    @abstractmethod
    def commit_exchange(self, request: ExchangeRequest) -> None:
        """Deliver `partner_delta` of a settled request, then release the partner's publication."""

    @abstractmethod
    def abort_exchange(self, request: ExchangeRequest) -> None:
        """Free what a settled request has claimed, without an exchange."""

    def native_exchange(
        self, codec: Codec, weight: float, records: Callable[[], RecordRing]
    ) -> PairExchanges | None:
        """Return what makes pair exchanges in fewer calls than this object, or None.

        It does the same word operations and passes, and writes the same records. No other object
        may use `codec` at the same time.

        Args:
            codec: codec of this rank.
            weight: share of the distance to the partner to move, in (0, 1/2].
            records: returns the ring that gets the rows of the exchanges.
        """
        return None

    @abstractmethod
    def read(self, rank: int, version: int | None = None) -> ReadRequest:
        """Ask for the publication of `rank`, the newest or a given version. Never waits.

        The newest version is copied, whatever its owner does meanwhile; `message` is None if there
        is none. A given version (1, 2, ...) settles when it is published, and is only safe if its
        owner publishes nothing two versions newer before this rank has read it.
        """

    @abstractmethod
    def acquire_send_buffer(self, rank: int) -> SendBuffer | None:
        """Return a message to write for `rank`, or None if nothing can be sent now. Never waits."""

    @abstractmethod
    def send(self, buffer: SendBuffer) -> None:
        """Send a buffer, written and stamped: it arrives exactly once, in order."""

    @abstractmethod
    def wait_until(
        self, condition: Callable[[], bool], ranks: Iterable[int] | None = None
    ) -> Request:
        """Return a request that is complete when `condition` holds.

        Args:
            condition: depends on control words only.
            ranks: ranks whose control words matter; None for this rank alone.
        """

    @abstractmethod
    def gradients(self) -> int:
        """Return the number of gradients of all ranks, as far as this one knows."""

    @abstractmethod
    def gradients_of(self, rank: int) -> int:
        """Return the number of gradients of `rank`: final once it is known to have finished."""

    @abstractmethod
    def report_gradients(self, gradients: int) -> None:
        """Publish how many gradients this rank has computed."""

    @abstractmethod
    def allreduce(self, array: np.ndarray) -> Request:
        """Replace `array` by its sum over all ranks, in place, until the request is complete."""

    @abstractmethod
    def is_flushed(self) -> bool:
        """Return whether all that was sent, committed, aborted or published has reached others.

        Raises:
            DeviceFailed: the device has failed, so that it never will.
        """

    @abstractmethod
    def time_ns(self) -> int:
        """Return the time in nanoseconds, comparable between ranks."""

    @abstractmethod
    def total_counters(self) -> Counters:
        """Return the counts of all threads together."""
