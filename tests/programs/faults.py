"""Protocols with one fault each, which the stress and the interleavings must find."""

from __future__ import annotations

import time
from typing import NamedTuple

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.control_words import CLAIMED, FREE, HEAD, READY, holder_of, pack_slot_word
from mpi_dasgd.transport.inbox import Inbox, ReceivedMessage, Reservation
from mpi_dasgd.transport.publication import Claim, Publication

__all__ = ["FAULTS", "Fault"]


class WritesPublished(Publication):
    """The owner writes to the slot that is published."""

    def reserve(self) -> Message | None:
        message = super().reserve()
        if message is None or self._newest is None:
            return message
        return self._slots.view(self._rank, self._newest)


class ReadsWithoutClaim(Publication):
    """A reader takes the newest version without a swap."""

    def claim(self, rank: int) -> Claim | None:
        head = self._words.read(rank, HEAD)
        return Claim(rank, head & 0xFF, head >> 8) if head else None


class IgnoresClaims(Publication):
    """The owner frees the slot of an old version although a reader has claimed it."""

    def _retire(self, slot: int, version: int) -> None:
        free = pack_slot_word(FREE, version=version)
        while not self._words.swap(
            self._rank,
            self._word_indices[slot],
            self._words.read(self._rank, self._word_indices[slot]),
            free,
        ):
            pass
        self._free.append(slot)
        self._last_words[slot] = free


class ReadsOnce(Publication):
    """A reader copies, slowly, and does not check the version again."""

    def read(self, rank: int, out: Message) -> bool:
        head = self._words.read(rank, HEAD)
        if head == 0:
            return False
        published = self._slots.view(rank, head & 0xFF)
        if published is None:
            self._slots.get(rank, head & 0xFF, out)
            return True
        half = out.buffer.size // 2
        out.buffer[:half] = published.buffer[:half]
        time.sleep(1e-4)
        out.buffer[half:] = published.buffer[half:]
        return True


class PublishesEarly(Publication):
    """The owner names a version the newest before it has written it."""

    def reserve(self) -> Message | None:
        message = super().reserve()
        if message is not None:
            super().publish()
        return message

    def publish(self) -> None:
        pass


class ReadyFirst(Inbox):
    """A sender sets the slot ready, then writes, slowly."""

    def view_of(self, reservation: Reservation) -> Message | None:
        return None

    def send(self, reservation: Reservation, message: Message) -> None:
        rank, slot = reservation.rank, reservation.slot
        message.sequence = self._sent[rank]
        self._sent[rank] += 1
        in_place = self._slots.view(rank, self._first_slot + slot)
        if in_place is not None:
            in_place.buffer[:64] = message.buffer[:64]
        self._words.swap(
            rank,
            self._word_indices[slot],
            pack_slot_word(CLAIMED, self._rank),
            pack_slot_word(READY, self._rank),
        )
        if in_place is None:
            self._slots.put(rank, self._first_slot + slot, message)
        else:
            time.sleep(1e-4)
            in_place.buffer[64:] = message.buffer[64:]


class SendsUnreserved(Inbox):
    """A sender takes a slot of the inbox whether it is free or not."""

    def reserve(self, rank: int) -> Reservation | None:
        slot = self._sent[rank] % len(self._word_indices)
        mine = pack_slot_word(CLAIMED, self._rank)
        while not self._words.swap(
            rank, self._word_indices[slot], self._words.read(rank, self._word_indices[slot]), mine
        ):
            pass
        return Reservation(rank, slot)

    def free(self, received: ReceivedMessage) -> None:
        ready = pack_slot_word(READY, received.sender)
        self._words.swap(self._rank, self._word_indices[received.slot], ready, pack_slot_word(FREE))


class OutOfOrder(Inbox):
    """The receiver takes messages in the order of the slots."""

    def receive(self) -> list[ReceivedMessage]:
        messages = []
        for slot, index in enumerate(self._word_indices):
            value = self._words.read(self._rank, index)
            message = self._slots.view(self._rank, self._first_slot + slot)
            if value & 3 == READY and message is not None:
                messages.append(ReceivedMessage(holder_of(value), slot, message))
        return messages


class Twice(OutOfOrder):
    """The receiver forgets now and then to free a message that it has used."""

    _calls = 0

    def free(self, received: ReceivedMessage) -> None:
        self._calls += 1
        if self._calls % 20 != 3:
            super().free(received)


class Drops(Inbox):
    """A sender cancels a message now and then instead of setting it ready."""

    _calls = 0

    def send(self, reservation: Reservation, message: Message) -> None:
        self._calls += 1
        if self._calls % 20 == 3:
            self.cancel(reservation)
        else:
            super().send(reservation, message)


class Fault(NamedTuple):
    """A faulty protocol.

    Attributes:
        publication, inbox: the classes to use.
        signs: findings of which at least one must occur.
    """

    publication: type[Publication]
    inbox: type[Inbox]
    signs: tuple[str, ...]


FAULTS = {
    "writes published": Fault(WritesPublished, Inbox, ("torn", "changed while claimed")),
    "reads without claim": Fault(ReadsWithoutClaim, Inbox, ("served twice",)),
    "ignores claims": Fault(IgnoresClaims, Inbox, ("torn", "changed while claimed")),
    "reads once": Fault(ReadsOnce, Inbox, ("torn",)),
    "publishes early": Fault(PublishesEarly, Inbox, ("torn", "wrong version")),
    "ready first": Fault(Publication, ReadyFirst, ("torn",)),
    "sends unreserved": Fault(Publication, SendsUnreserved, ("lost",)),
    "out of order": Fault(Publication, OutOfOrder, ("order",)),
    "twice": Fault(Publication, Twice, ("twice",)),
    "drops": Fault(Publication, Drops, ("lost",)),
}
