"""A release in Python, for devices that are late in tests without MPI."""

from __future__ import annotations

from mpi_dasgd.transport.control_words import Words
from tests.support.late_codec import Queue

__all__ = ["QueuedRelease"]


class QueuedRelease:
    """Swaps when the device has passed, each as a piece of its work: see `Release`.

    Args:
        words: control words of all ranks.
        queue: work of the rank's device.

    Attributes:
        failed: required swaps that have found another word.
    """

    def __init__(self, words: Words, queue: Queue) -> None:
        self._words, self._queue = words, queue
        self._pending = 0
        self.failed = 0

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> bool | None:
        """Swap later."""
        self._pending += 1

        def act() -> None:
            swapped = self._words.swap(rank, index, expected, new)
            self.failed += required and not swapped
            self._pending -= 1

        self._queue.submit(act)
        return None

    def flush(self) -> None:
        """Do nothing: swaps are on their way."""

    @property
    def is_pending(self) -> bool:
        """Whether swaps are still to be made."""
        return self._pending > 0
