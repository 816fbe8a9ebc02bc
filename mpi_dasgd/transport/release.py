"""Release: control-word swaps that give memory away, made once the device is done with it.

*Take now, give away later.* Swaps that acquire memory (claim, reserve) are made at once. Swaps that
give it away (publish, mark a message as complete, release a claim, free a message) may only be made
when the device has passed the work that reads or writes it; until then they wait in a release, in
their order. In host memory all work is done when it returns, and a release swaps at once.
"""

from __future__ import annotations

from typing import Protocol

from mpi_dasgd.transport.control_words import Words

__all__ = ["Immediate", "Release"]


class Release(Protocol):
    """Makes the swaps that give away memory of one rank, for one thread."""

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> bool | None:
        """Set a word to `new` if it is `expected`, when the device has passed.

        Args:
            rank, index: the word.
            expected, new: its values.
            required: whether the word cannot be another one, unless the protocol is broken.

        Returns:
            Whether the word was set; None if the swap is still to be made.

        Raises:
            Unreachable: the rank is gone.
        """

    def flush(self) -> None:
        """Have the swaps made when all work is done that was asked of the device so far.

        Raises:
            DeviceFailed: the device has failed.
            RuntimeError: a required swap has found another word.
        """

    @property
    def is_pending(self) -> bool:
        """Whether swaps are still to be made."""


class Immediate:
    """Swaps at once: for memory of the host.

    Args:
        words: control words of all ranks.
    """

    is_pending = False

    def __init__(self, words: Words) -> None:
        self._words = words

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> bool | None:
        """Set a word to `new` if it is `expected`; return whether it was."""
        swapped = self._words.swap(rank, index, expected, new)
        assert swapped or not required, "only the owner changes this word"
        return swapped

    def flush(self) -> None:
        """Do nothing: nothing is pending."""
