"""Inbox: messages that must arrive exactly once, in the order of their sender, without waiting.

A few slots are shared by all senders, whatever their number. A sender claims a free one by a swap,
writes the message, and sets it ready; if none is free it is told so and does something else.

Words of a slot: FREE -> CLAIMED(sender) -> READY(sender) -> FREE.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.control_words import (
    CLAIMED,
    FREE,
    READY,
    WordMap,
    Words,
    holder_of,
    pack_slot_word,
)
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.payload_slots import Slots

__all__ = ["Inbox", "ReceivedMessage", "Reservation"]


@dataclass(frozen=True)
class Reservation:
    """A slot in another rank's inbox, to be filled or cancelled."""

    rank: int
    slot: int


@dataclass(frozen=True)
class ReceivedMessage:
    """A message in the own inbox, readable until `Inbox.free`."""

    sender: int
    slot: int
    message: Message


class Inbox:
    """This rank's inbox, and its way into those of others.

    Args:
        words, slots: shared memory of all ranks.
        word_map: indices of the words.
        rank: this rank.
        counters: counts messages, bytes and refusals.
        sent: messages to each rank so far, if another inbox of this rank goes on with the count.
    """

    def __init__(
        self,
        words: Words,
        slots: Slots,
        word_map: WordMap,
        rank: int,
        counters: Counters,
        sent: defaultdict[int, int] | None = None,
    ) -> None:
        self._words = words
        self._slots = slots
        self._word_indices = word_map.inbox
        self._first_slot = len(
            word_map.publication
        )  # payload slots of the inbox follow those of the publication
        self._rank = rank
        self._counters = counters
        self._sent = defaultdict(int) if sent is None else sent
        self._received: defaultdict[int, int] = defaultdict(int)

    def reserve(self, rank: int) -> Reservation | None:
        """Claim a slot in the inbox of `rank`, or return None (counted) if all are taken."""
        count = len(self._word_indices)
        mine = pack_slot_word(CLAIMED, self._rank)
        for i in range(count):
            slot = (self._rank + self._sent[rank] + i) % count
            if self._words.swap(rank, self._word_indices[slot], pack_slot_word(FREE), mine):
                return Reservation(rank, slot)
        self._counters.inbox_full += 1
        return None

    def view_of(self, reservation: Reservation) -> Message | None:
        """Return where the message goes, or None if it must be put from a staging area."""
        return self._slots.view(reservation.rank, self._first_slot + reservation.slot)

    def send(self, reservation: Reservation, message: Message) -> None:
        """Deliver `message`, which is in place already or a staging area, and set the slot ready."""
        rank, slot = reservation.rank, reservation.slot
        message.sequence = self._sent[rank]
        if self._slots.view(rank, self._first_slot + slot) is not message:
            self._slots.put(rank, self._first_slot + slot, message)
        self._slots.fence()  # the payload must be there before a word says so
        done = self._words.swap(
            rank,
            self._word_indices[slot],
            pack_slot_word(CLAIMED, self._rank),
            pack_slot_word(READY, self._rank),
        )
        if done:  # else the receiver has given this rank up for dead and taken the slot back
            self._sent[rank] += 1
            self._counters.messages += 1
            self._counters.bytes_sent += message.layout.nbytes

    def cancel(self, reservation: Reservation) -> None:
        """Give a reserved slot back unused."""
        mine = pack_slot_word(CLAIMED, self._rank)
        self._words.swap(
            reservation.rank, self._word_indices[reservation.slot], mine, pack_slot_word(FREE)
        )

    def receive(self) -> list[ReceivedMessage]:
        """Return the messages that have arrived, each sender's in its order; `free` them after use."""
        ready: dict[tuple[int, int], ReceivedMessage] = {}
        for slot, index in enumerate(self._word_indices):
            value = self._words.read(self._rank, index)
            if value & 3 == READY:
                self._slots.fence()
                message = self._slots.view(self._rank, self._first_slot + slot)
                assert message is not None, "own slots are in place"
                arrival = ReceivedMessage(holder_of(value), slot, message)
                ready[arrival.sender, message.sequence] = arrival
        arrivals = []
        for sender, sequence in sorted(ready):
            # A later message may be seen while the scan missed an earlier one: it waits for the next call.
            if sequence == self._received[sender]:
                self._received[sender] += 1
                arrivals.append(ready[sender, sequence])
        self._counters.absorbed += len(arrivals)
        return arrivals

    @property
    def has_messages(self) -> bool:
        """Whether a message has arrived and was not freed."""
        return any(self._words.read(self._rank, index) & 3 == READY for index in self._word_indices)

    def free(self, arrival: ReceivedMessage) -> None:
        """Give the slot of a message back to the senders."""
        ready = pack_slot_word(READY, arrival.sender)
        freed = self._words.swap(
            self._rank, self._word_indices[arrival.slot], ready, pack_slot_word(FREE)
        )
        assert freed, "only the owner frees a message"

    def reclaim_from(self, rank: int) -> None:
        """Take back the slots that a dead rank reserved."""
        for index in self._word_indices:
            self._words.swap(self._rank, index, pack_slot_word(CLAIMED, rank), pack_slot_word(FREE))
