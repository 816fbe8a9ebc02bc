"""Phases: how many local steps lie between two interactions."""

from __future__ import annotations

import random

from mpi_dasgd.config.schema import AlgorithmConfig as Settings

__all__ = ["Phases"]


class Phases:
    """The phases of one rank: H steps each, or a geometric number of mean H (1, 2, ...).

    The geometric law has no memory: a phase ends with every step at probability 1/H, so that nothing
    but the source of random numbers must be kept in a checkpoint.

    Args:
        settings: section ``algorithm``: `local_steps` is H, `local_steps_distribution` fixed or geometric.
        rng: of the rank.
    """

    def __init__(self, settings: Settings, rng: random.Random) -> None:
        self._mean = settings.local_steps
        self._geometric = settings.local_steps_distribution == "geometric"
        self._rng = rng

    def ends(self, step: int) -> bool:
        """Return whether the phase ends with local step `step`, from 1. To be called once for each."""
        if self._geometric:
            return self._rng.random() * self._mean < 1
        return step % self._mean == 0
