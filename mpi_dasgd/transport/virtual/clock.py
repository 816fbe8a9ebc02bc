"""Virtual time: a queue of events."""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Virtual time, and the events to come. Events of the same time happen in order of entry.

    Attributes:
        now: the time, in the unit of the simulation.
        events: number of events that have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._entered = 0

    def after(self, delay: float, event: Callable[[], None]) -> None:
        """Schedule `event` to happen `delay` from now."""
        heapq.heappush(self._queue, (self.now + delay, self._entered, event))
        self._entered += 1

    def advance(self) -> bool:
        """Let the next event happen; return False if there is none."""
        if not self._queue:
            return False
        self.now, _, event = heapq.heappop(self._queue)
        self.events += 1
        event()
        return True
