"""A rank that stresses Publication and Inbox on a device that is late."""

from __future__ import annotations

from functools import partial
from typing import Any

from mpi_dasgd.codecs import Message
from mpi_dasgd.transport.inbox import Reservation
from tests.programs.ledger import Ledger, fill, number_of
from tests.programs.player import Player
from tests.support.late_codec import Queue

__all__ = ["LatePlayer"]

_NOTHING = -1  # element of a payload that is not there yet


class LatePlayer(Player):
    """Writes and reads payload when its device does, and gives it away right after asking for it.

    Args:
        queue: work of its device.
        others: as `Player`.

    Attributes:
        late: what the device finds of the payload it reads: `torn`, `foreign` and the like.
    """

    def __init__(self, queue: Queue, *others: Any) -> None:
        super().__init__(*others)
        self.late = Ledger(self.rank, self.ledger.size, 0)
        self._queue = queue

    def _fill(self, message: Message, stamp: int) -> None:
        """Write a header now, and the payload when it is due."""
        message.stamp(rank=self.rank, step=number_of(stamp), time_ns=0)
        message.payload[:] = _NOTHING

        def finish() -> None:
            self.late.found["taken away"] += bool((message.payload != _NOTHING).any())
            fill(message, self.rank, stamp, self.rest)

        self._queue.submit(finish)

    def _cancel(self, reservation: Reservation) -> None:
        """Cancel: what the device has been asked to write to cannot be given back."""
        self.inbox.cancel(reservation)

    def release(self) -> None:
        """Have one of the claims read once more, and release it."""
        if self.claims:
            claim = self.claims.pop(self.dice.randrange(len(self.claims)))
            self._queue.submit(partial(self.late.check_claimed, claim, self._view(claim)))
            self.publication.release(claim)

    def receive(self) -> bool:
        """Receive what has arrived, have it read, and free it."""
        messages = self.inbox.receive()
        for received in messages:
            sender, message = received.sender, received.message
            self.ledger.receive(sender, message)
            self._queue.submit(partial(self.late.check_received, sender, message))
            self.inbox.free(received)
        return bool(messages)
