"""Payload slots: where messages lie, seen by the protocols that share them."""

from __future__ import annotations

from typing import Protocol

from mpi_dasgd.codecs import Message

__all__ = ["Slots"]


class Slots(Protocol):
    """The payload slots of all ranks: those of the publication first, then those of the inbox."""

    def view(self, rank: int, index: int) -> Message | None:
        """Return slot `index` of `rank` where it lies, or None if it is on another node."""

    def get(self, rank: int, index: int, out: Message) -> None:
        """Copy slot `index` of `rank` to `out`; complete on return."""

    def put(self, rank: int, index: int, message: Message) -> None:
        """Copy `message` to slot `index` of `rank`; complete at the target on return."""

    def fence(self) -> None:
        """Order loads and stores in place before and after this call."""
