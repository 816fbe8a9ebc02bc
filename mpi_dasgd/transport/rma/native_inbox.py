"""The inbox of a rank of a node in native code; `Inbox` is the reference."""

from __future__ import annotations

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.control_words import WordMap, Words
from mpi_dasgd.transport.inbox import Inbox, ReceivedMessage, Reservation
from mpi_dasgd.transport.payload_slots import Slots
from mpi_dasgd.transport.rma.native_rank import NativeRank

__all__ = ["NativeInbox"]


class NativeInbox(Inbox):
    """This rank's inbox, whose state is in `native`, and its access to the inboxes of others.

    Args:
        native: native state of this rank, which the publication has in common.
        words, slots, word_map, rank: as for `Inbox`.
    """

    def __init__(
        self, native: NativeRank, words: Words, slots: Slots, word_map: WordMap, rank: int
    ) -> None:
        # Not that of the base: its state would be a second one, which nobody keeps.
        self._native = native
        self._words = words
        self._slots = slots
        self._word_indices = word_map.inbox
        self._first_slot = len(word_map.publication)
        self._rank = rank
        self._counters = native.counters

    def reserve(self, rank: int) -> Reservation | None:
        slot = self._native.call.inbox_reserve(rank)
        return None if slot < 0 else Reservation(rank, slot)

    def send(self, reservation: Reservation, message: Message) -> None:
        rank, slot = reservation.rank, reservation.slot
        if self._slots.view(rank, self._first_slot + slot) is not message:
            message.sequence = self._native.call.inbox_sent(rank)
            self._slots.put(rank, self._first_slot + slot, message)
        self._native.call.inbox_send(rank, slot)

    def cancel(self, reservation: Reservation) -> None:
        self._native.call.inbox_cancel(reservation.rank, reservation.slot)

    def receive(self) -> list[ReceivedMessage]:
        count = self._native.call.inbox_receive(self._native.arrivals_at)
        return [self._received_at(i) for i in range(count)]

    def _received_at(self, i: int) -> ReceivedMessage:
        arrival = self._native.arrivals[i]
        sender, slot = arrival.sender, arrival.slot
        message = self._slots.view(self._rank, self._first_slot + slot)
        assert message is not None, "own slots are in place"
        return ReceivedMessage(sender, slot, message)

    @property
    def has_messages(self) -> bool:
        return bool(self._native.call.inbox_has_messages())

    def free(self, received: ReceivedMessage) -> None:
        freed = self._native.call.inbox_free(received.sender, received.slot)
        assert freed, "only the owner frees a message"

    def reclaim_from(self, rank: int) -> None:
        self._native.call.inbox_reclaim_from(rank)
