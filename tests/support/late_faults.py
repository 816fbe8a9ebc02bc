"""Faulty orders of control words, which a late device must show: releases and publications."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpi_dasgd.transport.control_words import FREE, HEAD, READY, WordMap, Words, holder_of
from mpi_dasgd.transport.inbox import Inbox
from mpi_dasgd.transport.publication import Publication
from mpi_dasgd.transport.release import Release

if TYPE_CHECKING:  # its import starts MPI
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

__all__ = [
    "AT_ONCE", "Collects", "CountsSlots", "Hasty", "HeadFirst", "RetiresFirst", "TrustsOldWord",
    "WritesNewest", "make_hasty",
]  # fmt: skip


class Hasty:
    """Makes some swaps at once, and others when the device has passed.

    Args:
        inner: release that makes the others.
        words: control words of all ranks.
        at_once: given whether the word is this rank's own, whether it is of an inbox, and the word,
            says whether the swap is made at once.
        rank: this rank.
        inbox: indices of the words of an inbox.
    """

    def __init__(
        self,
        inner: Release,
        words: Words,
        at_once: Callable[[bool, bool], bool],
        rank: int,
        inbox: range,
    ) -> None:
        self._inner, self._words, self._at_once = inner, words, at_once
        self._rank, self._inbox = rank, inbox
        self.failed = 0

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> bool | None:
        """Swap now, or later."""
        if not self._at_once(rank == self._rank, index in self._inbox):
            return self._inner.swap(rank, index, expected, new, required=required)
        swapped = self._words.swap(rank, index, expected, new)
        self.failed += required and not swapped
        return swapped

    def flush(self) -> None:
        """Have the others made."""
        self._inner.flush()

    @property
    def is_pending(self) -> bool:
        """Whether swaps are still to be made."""
        return self._inner.is_pending


AT_ONCE: dict[str, Callable[[bool, bool], bool]] = {
    "all": lambda own, inbox: True,
    "publish": lambda own, inbox: own and not inbox,
    "send": lambda own, inbox: not own and inbox,
    "release": lambda own, inbox: not own and not inbox,
    "free": lambda own, inbox: own and inbox,
}
"""Swaps that are made although the device has not passed, by name."""


class HeadFirst:
    """Names a version the newest before its slot says so.

    Args:
        inner: release that makes the swaps.
        rank: this rank.
        word_map: indices of the words.
    """

    def __init__(self, inner: Release, rank: int, word_map: WordMap) -> None:
        self._inner, self._rank, self._slots = inner, rank, word_map.publication
        self._held: list[tuple[tuple[int, int, int, int], bool]] = []

    def _is_held(self, index: int, new: int) -> bool:
        return index in self._slots and new & 3 == READY

    def _is_last(self, index: int, new: int) -> bool:
        return index == HEAD

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> bool | None:
        """Swap later; in another order, if it is the publication's."""
        if rank == self._rank and self._is_held(index, new):
            self._held.append(((rank, index, expected, new), required))
            return None
        made = self._inner.swap(rank, index, expected, new, required=required)
        if rank == self._rank and self._is_last(index, new):
            self._make_held()
        return made

    def _make_held(self) -> None:
        for swap, required in self._held:
            self._inner.swap(*swap, required=required)
        self._held.clear()

    def flush(self) -> None:
        """Have the swaps made."""
        self._make_held()
        self._inner.flush()

    @property
    def is_pending(self) -> bool:
        """Whether swaps are still to be made."""
        return bool(self._held) or self._inner.is_pending


class RetiresFirst(HeadFirst):
    """Frees the slot of the old version before the new one is named."""

    def _is_held(self, index: int, new: int) -> bool:
        first = index == HEAD and new >> 8 == 1  # no old version follows
        return (super()._is_held(index, new) and new >> 22 > 1) or (index == HEAD and not first)

    def _is_last(self, index: int, new: int) -> bool:
        return index in self._slots and new & 3 == FREE


class CountsSlots(Publication):
    """Takes every slot whose swap is pending for one that others have claimed."""

    @property
    def claims(self) -> int:
        return super().claims + len(self._replaced)


class Collects(Publication):
    """Takes a slot for free because its word is still that of the version before."""

    def _collect(self) -> int:
        for slot in tuple(self._replaced):
            value = self._words.read(self._rank, self._word_indices[slot])
            if value & 3 == FREE:
                del self._replaced[slot]
                self._free.append(slot)
                self._last_words[slot] = value
        return super()._collect()


class WritesNewest(Publication):
    """Takes a slot that a reader has freed while the head still names it."""

    def _is_replaced(self, version: int) -> bool:
        return True


class TrustsOldWord(Inbox):
    """Takes a number for that of a message whose slot was READY when it was looked at before."""

    def _is_another(self, slot: int, value: int, sequence: int) -> bool:
        return self._freeing[slot] != (holder_of(value), sequence)


def make_hasty(endpoint: RmaEndpoint, name: str) -> None:
    """Let an endpoint make the swaps of that name of `AT_ONCE` before the device has passed."""
    inbox = endpoint.inbox._word_indices
    hasty = Hasty(endpoint.release, endpoint._words, AT_ONCE[name], endpoint.rank, inbox)
    endpoint.release = endpoint.publication._release = endpoint.inbox._release = hasty
