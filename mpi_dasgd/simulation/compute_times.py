"""Compute times of the ranks of a simulation."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.config.schema import SimulationConfig
from mpi_dasgd.straggler import random_factor, resolve_ranks

__all__ = ["ComputeTimes"]


class ComputeTimes:
    """Draws how long gradients take on the virtual clock.

    Args:
        config: section ``simulation`` of a configuration.

    Raises:
        UserError: a rank of `config.slow_ranks` does not exist among `config.ranks` ranks.
    """

    def __init__(self, config: SimulationConfig) -> None:
        slow = resolve_ranks(config.slow_ranks, config.ranks)
        self._means = [
            (config.slow_factor if rank in slow else 1.0) * config.compute_mean
            for rank in range(config.ranks)
        ]
        self._distribution = config.compute_time
        self._sigma = config.compute_sigma

    def draw(self, rank: int, rng: np.random.Generator) -> float:
        """Draw the virtual seconds that the next gradient of `rank` takes."""
        return self._means[rank] * random_factor(self._distribution, self._sigma, rng)
