"""Local phases: the number of local steps between two interactions."""

from __future__ import annotations

import random

from mpi_dasgd.config.schema import AlgorithmConfig

__all__ = ["Phases"]


class Phases:
    """The phases of one rank: H steps each, or a geometric number (1, 2, ...) of mean H.

    The geometric distribution has no memory: a phase ends with every step at probability 1/H, so
    that a checkpoint needs to hold nothing but the state of the random generator.

    Args:
        settings: section ``algorithm``: `local_steps` is H, `local_steps_distribution` is fixed or
            geometric.
        rng: generator of the rank's random choices.
    """

    def __init__(self, settings: AlgorithmConfig, rng: random.Random) -> None:
        self._mean = settings.local_steps
        self._geometric = settings.local_steps_distribution == "geometric"
        self._rng = rng

    def ends(self, step: int) -> bool:
        """Return whether the phase ends with local step `step`, from 1; call it once per step."""
        if self._geometric:
            return self._rng.random() * self._mean < 1
        return step % self._mean == 0
