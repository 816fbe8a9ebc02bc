"""Random gradients of the gossip in `bench quality`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mpi_dasgd.kernels.encoded import BUCKET

__all__ = ["BUCKETS", "DISTRIBUTIONS", "GradientDistribution", "RandomGradients"]

BUCKETS = 48
"""Buckets of the models."""
LOCAL_STEPS = 3
"""Local steps of a rank per turn."""


class GradientDistribution(NamedTuple):
    """Distribution of the gradients.

    Attributes:
        degrees_of_freedom: those of Student's t distribution; 0 for the normal distribution.
        large_share: share of a bucket's elements whose gradients are larger.
        large_factor: factor by which they are larger.
    """

    degrees_of_freedom: int
    large_share: float = 0.0
    large_factor: float = 1.0


DISTRIBUTIONS = {
    "gauss": GradientDistribution(0),
    "t3": GradientDistribution(3),
    "gauss mixed": GradientDistribution(0, 0.05, 30),
    "t3 mixed": GradientDistribution(3, 0.05, 30),
}
"""Distributions by name. In a mixed bucket 5 % of the elements have gradients 30 times larger."""


class RandomGradients:
    """Random gradients, the same for all settings: slices of a pool of numbers of variance 1.

    Args:
        distribution: distribution of the gradients.
        rng: source of all random numbers.

    Attributes:
        model: initial model, float32, shape (elements,).
        size: standard deviation of each element's gradient, float32, shape (elements,).
        small: mask of the elements with small gradients, bool, shape (elements,).
    """

    _POOL = 2**22

    def __init__(self, distribution: GradientDistribution, rng: np.random.Generator) -> None:
        self._rng = rng
        if distribution.degrees_of_freedom:
            pool = rng.standard_t(distribution.degrees_of_freedom, self._POOL)
        else:
            pool = rng.normal(size=self._POOL)
        self._pool = (pool / pool.std()).astype(np.float32)
        size = np.exp(rng.normal(size=(BUCKETS, 1))).repeat(BUCKET, 1)
        small = rng.random(size.shape) >= distribution.large_share
        self.model = (0.1 * size * rng.normal(size=size.shape)).astype(np.float32).reshape(-1)
        size = np.where(small, size, distribution.large_factor * size)
        self.size = size.astype(np.float32).reshape(-1)
        self.small = small.reshape(-1)

    def draw(self) -> np.ndarray:
        """Return the sum of the gradients of all local steps of a turn, float32, (elements,)."""
        elements = self.size.size
        total = np.zeros(elements, np.float32)
        for start in self._rng.integers(0, self._POOL - elements, LOCAL_STEPS):
            total += self._pool[start : start + elements]
        return total * self.size
