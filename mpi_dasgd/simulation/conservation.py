"""The conservation oracle: exchanges conserve the sum of all mass, and only gradients move it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.transport.control_words import READY
from mpi_dasgd.transport.virtual.memory import SharedMemory

__all__ = ["ConservationOracle", "total_mass"]


class ConservationOracle:
    """Follows what the sum of all ranks' `mass` must be.

    Args:
        models: models of all ranks before the first step, (ranks, elements).

    Attributes:
        expected_sum: sum of all mass if exchanges conserve it, (elements,) float64.
    """

    def __init__(self, models: np.ndarray) -> None:
        self.expected_sum = models.sum(0, dtype=np.float64)

    def observer(self, algorithm: Algorithm) -> Callable[[np.ndarray], None]:
        """Return the function to call with every decrement, (elements,), of a rank's model."""

        def observe(decrement: np.ndarray) -> None:
            weight = algorithm.mass_weight
            self.expected_sum -= decrement if weight == 1.0 else weight * decrement

        return observe

    def error(self, total_mass: np.ndarray, models: np.ndarray) -> float:
        """Return the largest deviation of `total_mass` from `expected_sum`, relative to the models.

        Args:
            total_mass: sum of all mass as measured, (elements,).
            models: models of all ranks, (ranks, elements).
        """
        scale = np.abs(models).sum(0, dtype=np.float64).max()
        return float(np.abs(total_mass - self.expected_sum).max() / scale)


def total_mass(algorithms: Sequence[Algorithm], memory: SharedMemory) -> np.ndarray:
    """Return the sum of all ranks' mass and of the messages in flight, (elements,) float64."""
    total = np.sum([algorithm.mass() for algorithm in algorithms], axis=0, dtype=np.float64)
    total += _mass_in_flight(algorithms, memory)
    return np.asarray(total)


def _mass_in_flight(algorithms: Sequence[Algorithm], memory: SharedMemory) -> np.ndarray:
    """Return the sum of the deltas that were sent and not absorbed, (elements,) float64."""
    total = np.zeros(algorithms[0].x.shape)
    word_map = memory.word_map
    for rank, algorithm in enumerate(algorithms):
        for slot, index in enumerate(word_map.inbox):
            if memory.read(rank, index) & 3 == READY:
                message = memory.view(rank, len(word_map.publication) + slot)
                total += algorithm.mass_of(message)
    return total
