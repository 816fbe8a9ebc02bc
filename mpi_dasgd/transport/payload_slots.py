"""Payload slots: the memory of messages, as the protocols see it."""

from __future__ import annotations

from typing import Protocol

from mpi_dasgd.codecs import Layout, Message

__all__ = ["Slots"]


class Slots(Protocol):
    """The payload slots of all ranks: those of the publication first, then those of the inbox.

    A slot holds one message: `layout.nbytes` contiguous bytes.

    Attributes:
        layout: layout of every message.
    """

    layout: Layout

    def view(self, rank: int, index: int) -> Message | None:
        """Return slot `index` of `rank` in place, or None if it is on another node."""

    def get(self, rank: int, index: int, out: Message) -> None:
        """Copy slot `index` of `rank` to `out`; complete on return.

        Raises:
            Unreachable: the rank is gone.
        """

    def put(self, rank: int, index: int, message: Message) -> None:
        """Copy `message` to slot `index` of `rank`; complete at the target on return.

        Raises:
            Unreachable: the rank is gone.
        """

    def fence(self) -> None:
        """Order loads and stores in place before this call and those after it."""
