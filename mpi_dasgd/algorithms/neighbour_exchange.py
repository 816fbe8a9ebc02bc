"""What averages with a neighbour's publication share, whether they change both sides or one."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm
from mpi_dasgd.algorithms.communication import publish_vector
from mpi_dasgd.kernels.optimizer import OptimizerStep

__all__ = ["PAIR_CODECS", "NeighbourExchange"]

PAIR_CODECS = ("lattice8", "none", "bf16", "fp16", "lattice4", "lattice16", "qsgd8")
"""Codecs for models that are averaged with a neighbour's, the default first."""


class NeighbourExchange:
    """Base of one rank's averages with publications of its neighbours.

    Args:
        algorithm: algorithm of this rank, whose endpoint, codec, settings, generator of random
            choices and exchange records are used.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self._endpoint = algorithm.endpoint
        self._codec = algorithm.codec
        self._settings = algorithm.settings
        self._rng = algorithm.rng
        self._records = algorithm.records

    def publish(self, y: np.ndarray, step: int, update: OptimizerStep | None = None) -> bool:
        """Publish a vector outside of an average; return whether a slot was free.

        Args:
            y: own vector, shape (elements,), contiguous.
            step: own local step, for the header.
            update: step of the local optimizer on `y`, to be made first, in the same pass.

        Raises:
            Diverged: `y` is not finite after `update`; no other rank has seen it.
        """
        return publish_vector(self._endpoint, self._codec, y, step, update) is not None
