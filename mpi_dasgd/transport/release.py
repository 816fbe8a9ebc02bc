"""Release: control-word swaps that give memory away, made once the device is done with it.

*Take now, give away later.* Swaps that acquire memory (claim, reserve) are made at once. Swaps that
give it away (publish, mark a message as complete, release a claim, free a message) may only be made
when the device has passed the work that reads or writes it; until then they wait in a release, in
their order. In host memory all work is done when it returns, and a release swaps at once.
"""

from __future__ import annotations

import time
from typing import Protocol

from mpi_dasgd.device.base import Device
from mpi_dasgd.errors import DeviceFailed
from mpi_dasgd.transport.control_words import Words

__all__ = ["Immediate", "Release", "Synced", "await_release"]

_POLL_SECONDS = 1e-4


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
            Whether the word was set, which the caller checks if it is required; None if the swap is
            still to be made: then `flush` checks it.

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
        return self._words.swap(rank, index, expected, new)

    def flush(self) -> None:
        """Do nothing: nothing is pending."""


class Synced:
    """Waits for the device, then swaps: for words that only MPI can change.

    Args:
        words: control words of all ranks.
        device: device of this rank.
    """

    is_pending = False

    def __init__(self, words: Words, device: Device) -> None:
        self._words = words
        self._device = device

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> bool | None:
        """Wait, set a word to `new` if it is `expected`, and return whether it was.

        Raises:
            DeviceFailed: the device has failed; the word is as it was.
        """
        self._device.mark().wait()
        return self._words.swap(rank, index, expected, new)

    def flush(self) -> None:
        """Do nothing: nothing is pending."""


def await_release(release: Release, timeout: float = 60.0) -> None:
    """Wait until no swap is pending, and see what became of them.

    Args:
        release: release of this rank, flushed.
        timeout: seconds to wait for the device.

    Raises:
        DeviceFailed: the device has failed, or is not done in time.
        RuntimeError: a required swap has found another word.
    """
    deadline = time.monotonic() + timeout
    while release.is_pending:
        if time.monotonic() > deadline:
            raise DeviceFailed(f"the device is not done with its work after {timeout:g} s")
        time.sleep(_POLL_SECONDS)
    release.flush()
