"""Random delays of virtual messages, for `VirtualEndpoint(network, rank, delays)`."""

from __future__ import annotations

import random


class RandomDelays:
    """Exponential delays: one draw for every operation of a rank.

    Args:
        rng: source of the delays; ranks may share it.
        mean: mean delay.
        overtaking: whether a message may overtake an earlier one of the same sender, which
            it cannot do on windows.
    """

    instant = False

    def __init__(self, rng: random.Random, mean: float, *, overtaking: bool = False) -> None:
        self._rng = rng
        self._mean = mean
        self._overtaking = overtaking
        self._latest = 0.0

    def word_delay(self) -> float:
        """One-way time of an operation on a control word."""
        return self._rng.expovariate(1 / self._mean)

    def message_delay(self, now: float) -> float:
        """Time that a message sent at `now` takes."""
        at = now + self._rng.expovariate(1 / self._mean)
        if not self._overtaking:
            at = self._latest = max(self._latest, at)
        return at - now
