"""Ledger of what one rank published, sent, read and received, and of what must not happen to it.

Every element of a payload carries the same stamp: kind, sender, receiver and number. Torn is a
payload whose smallest and largest element differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.transport.publication import Claim

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Ledger", "fill", "layout", "number_of", "staging"]

_PUBLICATION, _MESSAGE, _CANCELLED = 1, 2, 3


def layout(elements: int) -> Layout:
    """Messages of `elements` stamps."""
    return Layout(
        codec=0, elements=elements, payload_dtype=np.dtype(np.int64), payload_items=elements
    )


def staging(elements: int) -> Message:
    """A message in memory of its own."""
    parts = layout(elements)
    return Message(np.zeros(parts.nbytes, np.uint8), parts)


def fill(message: Message, rank: int, stamp: int, rest: Callable[[], None]) -> None:
    """Write a stamp to a message, resting in the middle of it."""
    middle = message.payload.size // 2
    message.payload[:middle] = stamp
    rest()
    message.payload[middle:] = stamp
    message.stamp(rank=rank, step=number_of(stamp), time_ns=0)


def _stamp(kind: int, sender: int, receiver: int, number: int) -> int:
    return kind << 56 | sender << 48 | receiver << 40 | number


def number_of(stamp: int) -> int:
    """Return the number in a stamp."""
    return stamp & (1 << 40) - 1


class Ledger:
    """What one rank did and saw.

    Args:
        rank: this rank.
        size: number of ranks.
        most: more versions or messages than any rank makes.

    Attributes:
        found: how often something happened that must not.
        done: how often each kind of operation was done.
        served: (size, most + 1) exchanges that each version served, as far as this rank knows.
    """

    def __init__(self, rank: int, size: int, most: int) -> None:
        self.rank = rank
        self.size = size
        self.found: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.published = 0
        self.sent = np.zeros(size, np.int64)
        self._read = [0] * size  # newest version of each rank that was read
        self._claimed = [0] * size  # the same, claimed
        self.served = np.zeros((size, most + 1), np.uint8)
        self._received = np.zeros((size, most + 1), bool)  # whether each message arrived
        self._next = [0] * size  # number of the message that each rank must send next

    def version(self) -> int:
        """Stamp of the next publication; count it by `publish`."""
        return _stamp(_PUBLICATION, self.rank, 0, self.published + 1)

    def publish(self) -> None:
        """A version was published."""
        self.published += 1
        self.done["published"] += 1

    def message(self, receiver: int, ahead: int = 0) -> int:
        """Stamp of the next message to `receiver`, or of one after it; count it by `send`."""
        return _stamp(_MESSAGE, self.rank, receiver, int(self.sent[receiver]) + ahead)

    def cancelled(self) -> int:
        """Stamp of a message that is never sent."""
        return _stamp(_CANCELLED, self.rank, 0, 0)

    def send(self, receiver: int) -> None:
        """A message was sent to `receiver`."""
        self.sent[receiver] += 1
        self.done["sent"] += 1

    def read(self, owner: int, message: Message) -> None:
        """Check a copy of the newest version of `owner`."""
        number = self._check(message, _PUBLICATION, owner, 0)
        self.done["read"] += 1
        if number is not None:
            self.found["backwards"] += number < self._read[owner]
            self._read[owner] = max(number, self._read[owner])

    def claim(self, claim: Claim, message: Message) -> None:
        """Check a version that was claimed, and count that it serves an exchange."""
        number = self._check(message, _PUBLICATION, claim.rank, 0)
        self.done["claimed"] += 1
        served = self.served[claim.rank]
        served[claim.version] = min(9, served[claim.version] + 1)  # the sum over ranks has 8 bits
        self.found["backwards"] += claim.version <= self._claimed[claim.rank]
        self._claimed[claim.rank] = max(claim.version, self._claimed[claim.rank])
        self.found["wrong version"] += number is not None and number != claim.version

    def check_claimed(self, claim: Claim, message: Message) -> None:
        """Check that a claimed version has not changed."""
        number = self._check(message, _PUBLICATION, claim.rank, 0)
        self.found["changed while claimed"] += number is not None and number != claim.version

    def receive(self, sender: int, message: Message) -> None:
        """Check a message that came out of the inbox."""
        number = self._check(message, _MESSAGE, sender, self.rank)
        self.done["received"] += 1
        if number is None:
            return
        self.found["twice"] += bool(self._received[sender, number])
        self.found["order"] += number != self._next[sender]
        self._next[sender] = max(number + 1, self._next[sender])
        self._received[sender, number] = True

    def newest(self, owner: int, version: int) -> None:
        """Check that the last version of `owner` is the one read last."""
        self.found["newest lost"] += self._read[owner] != version

    def _check(self, message: Message, kind: int, sender: int, receiver: int) -> int | None:
        """Return the number of a message, or None if it is not whole or not the right one."""
        low, high = int(message.payload.min()), int(message.payload.max())
        try:
            header = message.header
        except MpiDasgdError:
            header = None
        if low != high or header is None or (header.rank, header.step) != (sender, number_of(low)):
            self.found["torn"] += 1
            return None
        if low >> 40 != _stamp(kind, sender, receiver, 0) >> 40:
            self.found["foreign"] += 1
            return None
        return number_of(low)

    def check_received(self, sender: int, message: Message) -> None:
        """Check that a message which was received has not changed."""
        self._check(message, _MESSAGE, sender, self.rank)

    def lost(self, sent: np.ndarray) -> None:
        """Find messages that were sent to this rank and did not arrive.

        Args:
            sent: (size, size) number of messages that each rank has sent to each.
        """
        received = self._received.sum(axis=1)
        self.found["lost"] += int((sent[:, self.rank] - received).clip(0).sum())

    def balance(self, comm: MPI.Intracomm) -> tuple[Counter[str], Counter[str]]:
        """Compare the ledgers of all ranks; return what was found and what was done. Collective."""
        self.lost(np.array(comm.allgather(self.sent)))
        served = np.zeros_like(self.served)
        comm.Allreduce(self.served, served)
        if self.rank == 0:
            self.found["served twice"] += int((served > 1).sum())
        found: Counter[str] = Counter()
        done: Counter[str] = Counter()
        for rank_found, rank_done in comm.allgather((self.found, self.done)):
            found.update(rank_found)
            done.update(rank_done)
        return +found, done
