"""Inbox: messages that must arrive exactly once, in the order of each sender, without waiting.

All senders, however many, share a few slots. A sender claims a free slot by a swap, writes its
message and marks the slot ready; if no slot is free, it learns so at once and does something else.

Words of a slot: FREE -> CLAIMED(sender) -> READY(sender) -> FREE.

The swaps to READY and back to FREE go through a `Release`, and may be made later than they are
asked for, in their order.
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
from mpi_dasgd.transport.release import Immediate, Release

__all__ = ["Inbox", "ReceivedMessage", "Reservation"]


@dataclass(frozen=True)
class Reservation:
    """A slot of another rank's inbox, claimed: to be sent or cancelled."""

    rank: int
    slot: int


@dataclass(frozen=True)
class ReceivedMessage:
    """A message in the own inbox, readable until `Inbox.free`."""

    sender: int
    slot: int
    message: Message


class Inbox:
    """This rank's inbox, and its access to the inboxes of others.

    Args:
        words: control words of all ranks.
        slots: payload slots of all ranks.
        word_map: indices of the slots' words.
        rank: this rank.
        counters: where messages, bytes and full inboxes are counted.
        sent: number of messages sent to each rank so far, shared by all inbox objects of this rank
            that send to the same ranks; None: a count of its own.
        release: makes the swaps that give memory away; None: at once.
    """

    def __init__(
        self,
        words: Words,
        slots: Slots,
        word_map: WordMap,
        rank: int,
        counters: Counters,
        sent: defaultdict[int, int] | None = None,
        release: Release | None = None,
    ) -> None:
        self._words = words
        self._release = Immediate(words) if release is None else release
        self._slots = slots
        self._word_indices = word_map.inbox
        # payload slots of the inbox follow those of the publication
        self._first_slot = len(word_map.publication)
        self._rank = rank
        self._counters = counters
        self._sent = defaultdict(int) if sent is None else sent
        self._received: defaultdict[int, int] = defaultdict(int)
        # messages whose slots are still to be freed, by slot: sender and number
        self._freeing: dict[int, tuple[int, int]] = {}
        self._interrupted: set[int] = set()  # senders that may leave out numbers from now on

    def reserve(self, rank: int) -> Reservation | None:
        """Claim a slot in the inbox of `rank`, or return None (counted) if it is full."""
        count = len(self._word_indices)
        mine = pack_slot_word(CLAIMED, self._rank)
        for i in range(count):
            slot = (self._rank + self._sent[rank] + i) % count
            if self._words.swap(rank, self._word_indices[slot], pack_slot_word(FREE), mine):
                return Reservation(rank, slot)
        self._counters.inbox_full += 1
        return None

    def view_of(self, reservation: Reservation) -> Message | None:
        """Return the reserved slot in place, or None if it is on another node."""
        return self._slots.view(reservation.rank, self._first_slot + reservation.slot)

    def send(self, reservation: Reservation, message: Message) -> None:
        """Deliver a message, and mark the slot ready.

        Args:
            reservation: the slot.
            message: `view_of(reservation)`, or a staging buffer that is copied to the slot.

        Raises:
            Unreachable: the receiver is gone.
        """
        rank, slot = reservation.rank, reservation.slot
        message.sequence = self._sent[rank]
        if self._slots.view(rank, self._first_slot + slot) is not message:
            self._slots.put(rank, self._first_slot + slot, message)
        self._slots.fence()  # the payload must be complete before the word says so
        delivered = self._release.swap(
            rank,
            self._word_indices[slot],
            pack_slot_word(CLAIMED, self._rank),
            pack_slot_word(READY, self._rank),
        )
        if delivered is not False:  # the receiver took this rank for dead and reclaimed the slot
            self._sent[rank] += 1
            self._counters.messages += 1
            self._counters.bytes_sent += message.layout.nbytes

    def cancel(self, reservation: Reservation) -> None:
        """Free a reserved slot unused."""
        mine = pack_slot_word(CLAIMED, self._rank)
        self._words.swap(
            reservation.rank, self._word_indices[reservation.slot], mine, pack_slot_word(FREE)
        )

    def receive(self) -> list[ReceivedMessage]:
        """Return the messages that have arrived, in order per sender; `free` each after use."""
        ready = self._ready()
        if self._interrupted:
            ready = self._skip_lost(ready)
        in_order = []
        for sender, sequence in sorted(ready):
            # The scan may see a message and have missed an earlier one: the next call returns both.
            if sequence == self._received[sender]:
                self._received[sender] += 1
                in_order.append(ready[sender, sequence])
        self._counters.absorbed += len(in_order)
        return in_order

    def _ready(self) -> dict[tuple[int, int], ReceivedMessage]:
        """Return what is in the slots that are READY, by sender and number."""
        ready: dict[tuple[int, int], ReceivedMessage] = {}
        for slot, index in enumerate(self._word_indices):
            value = self._words.read(self._rank, index)
            if value & 3 == READY:
                self._slots.fence()
                message = self._slots.view(self._rank, self._first_slot + slot)
                assert message is not None, "own slots are in place"
                received = ReceivedMessage(holder_of(value), slot, message)
                sequence = message.sequence
                if slot not in self._freeing or self._is_another(slot, value, sequence):
                    ready[received.sender, sequence] = received
        return ready

    def _is_another(self, slot: int, value: int, sequence: int) -> bool:
        """Return whether a slot that is still to be freed holds another message by now.

        The next sender may have reserved the slot and numbered its message after the word was read,
        which was READY for the message before; so the word must be READY after that, too.

        Args:
            slot: the slot.
            value: its word, READY, read before `sequence`.
            sequence: number that was read.
        """
        if self._freeing[slot] == (holder_of(value), sequence):
            return False
        self._slots.fence()
        if self._words.read(self._rank, self._word_indices[slot]) != value:
            return False
        del self._freeing[slot]
        return True

    def _skip_lost(
        self, seen: dict[tuple[int, int], ReceivedMessage]
    ) -> dict[tuple[int, int], ReceivedMessage]:
        """Scan again, and do not wait for numbers that senders taken for dead have left out.

        A message was numbered before the swap that would have delivered it, and that found the slot
        reclaimed. Numbers are READY in order: one that is missing in a scan which began after a
        later one was seen is lost.
        """
        ready = self._ready()
        for sender in self._interrupted:
            due = [n for rank, n in ready if rank == sender and n >= self._received[sender]]
            if any((sender, number) in seen for number in due):
                self._received[sender] = min(due)
        return ready

    @property
    def has_messages(self) -> bool:
        """Whether a message has arrived for which `free` was not called yet."""
        for slot, index in enumerate(self._word_indices):
            value = self._words.read(self._rank, index)
            if value & 3 == READY and not (slot in self._freeing and self._is_freeing(slot, value)):
                return True
        return False

    def _is_freeing(self, slot: int, value: int) -> bool:
        """Return whether the message in a slot with that word is only still to be freed."""
        self._slots.fence()
        message = self._slots.view(self._rank, self._first_slot + slot)
        assert message is not None, "own slots are in place"
        return not self._is_another(slot, value, message.sequence)

    def free(self, received: ReceivedMessage) -> None:
        """Free the slot of a message for the next sender."""
        ready = pack_slot_word(READY, received.sender)
        freed = self._release.swap(
            self._rank,
            self._word_indices[received.slot],
            ready,
            pack_slot_word(FREE),
            required=True,
        )
        assert freed is not False, "only the owner frees a message"
        if freed is None:
            self._freeing[received.slot] = received.sender, received.message.sequence

    def reclaim_from(self, rank: int) -> None:
        """Free the slots that dead rank `rank` has reserved."""
        for index in self._word_indices:
            if self._words.swap(
                self._rank, index, pack_slot_word(CLAIMED, rank), pack_slot_word(FREE)
            ):
                self._interrupted.add(rank)
