"""What a rank does to stress Publication and Inbox: each move is checked by its ledger."""

from __future__ import annotations

import random
from collections.abc import Callable

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.inbox import Inbox, Reservation
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.publication import Claim, Publication
from tests.programs.ledger import Ledger, fill, staging

__all__ = ["Player"]


class Player:
    """The moves of one rank.

    Args:
        publication, inbox: the protocols to stress.
        slots: their payload.
        ledger: this rank's ledger.
        elements: number of elements of a message.
        dice: chooses partners and variants of a move.
        rest: called in the middle of writing a message.
    """

    def __init__(
        self,
        publication: Publication,
        inbox: Inbox,
        slots: Slots,
        ledger: Ledger,
        elements: int,
        dice: random.Random,
        rest: Callable[[], None],
    ) -> None:
        self.publication = publication
        self.inbox = inbox
        self.slots = slots
        self.ledger = ledger
        self.dice = dice
        self.rest = rest
        self.rank = ledger.rank
        self.others = [rank for rank in range(ledger.size) if rank != ledger.rank]
        self.claims: list[Claim] = []
        self._out, self._partner_model, self._outgoing = (staging(elements) for _ in range(3))

    def other(self) -> int:
        """Return another rank."""
        return self.dice.choice(self.others)

    def publish(self) -> None:
        """Publish the next version, if there is a slot."""
        message = self.publication.reserve()
        if message is not None:
            self._fill(message, self.ledger.version())
            self.publication.publish()
            self.ledger.publish()

    def read(self, owner: int) -> None:
        """Copy the newest version of another rank, unclaimed."""
        if self.publication.read(owner, self._out):
            self.ledger.read(owner, self._out)

    def claim(self, owner: int) -> None:
        """Claim the newest version of another rank, and keep it."""
        claim = self.publication.claim(owner)
        if claim is not None:
            self.ledger.claim(claim, self._view(claim))
            self.claims.append(claim)

    def release(self) -> None:
        """Release one of the claims, after another check."""
        if self.claims:
            claim = self.claims.pop(self.dice.randrange(len(self.claims)))
            self.ledger.check_claimed(claim, self._view(claim))
            self.publication.release(claim)

    def _view(self, claim: Claim) -> Message:
        in_place = self.slots.view(claim.rank, claim.slot)
        if in_place is None:
            self.slots.get(claim.rank, claim.slot, self._partner_model)
        return in_place or self._partner_model

    def send(self, receiver: int) -> bool:
        """Send one message, or two in reverse order, or cancel one; return False if full."""
        first = self.inbox.reserve(receiver)
        if first is None:
            return False
        if self.dice.random() < 0.2:
            second = self.inbox.reserve(receiver)
            if second is not None:
                if self.dice.random() < 0.5:
                    self._deliver(second)
                else:
                    self._cancel(second)
                    self.ledger.done["cancelled"] += 1
        self._deliver(first)
        return True

    def _cancel(self, reservation: Reservation) -> None:
        self._write(reservation, self.ledger.cancelled())
        self.inbox.cancel(reservation)

    def _deliver(self, reservation: Reservation) -> None:
        message = self._write(reservation, self.ledger.message(reservation.rank))
        self.inbox.send(reservation, message)
        self.ledger.send(reservation.rank)

    def _write(self, reservation: Reservation, stamp: int) -> Message:
        message = self.inbox.view_of(reservation) or self._outgoing
        self._fill(message, stamp)
        return message

    def _fill(self, message: Message, stamp: int) -> None:
        fill(message, self.rank, stamp, self.rest)

    def receive(self) -> bool:
        """Receive the messages that have arrived; return whether any have."""
        messages = self.inbox.receive()
        for received in messages:
            self.ledger.receive(received.sender, received.message)
            self.inbox.free(received)
        return bool(messages)
