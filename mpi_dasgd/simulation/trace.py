"""Trace of a simulation: distances of the models from each other and from the optimum over time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Trace"]

_BLOCK = 1 << 16  # elements
_DIVERGED = 1e12  # squared distance at which a run counts as diverged


@dataclass
class Trace:
    """Samples of a simulation; all lists have one element per sample.

    Attributes:
        gradients: number of gradients computed by all ranks.
        times: virtual time.
        consensus_distance: mean_i |x_i - mean|^2.
        distance: |mean - optimum|^2, with the mean of the models that are trained.
    """

    gradients: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    consensus_distance: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)

    def append(
        self,
        gradients: int,
        now: float,
        models: np.ndarray,
        trained: np.ndarray,
        optimum: np.ndarray,
    ) -> bool:
        """Add a sample; return whether the run has diverged.

        Args:
            gradients: number of gradients computed by all ranks.
            now: virtual time.
            models: models of all ranks, (ranks, elements).
            trained: mean of the models that are trained, (elements,) float64.
            optimum: minimizer of the problem, (elements,) float64.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            consensus_distance = _sum_of_squares(models, models.mean(0)) / len(models)
            distance = float(np.square(trained - optimum).sum())
        self.gradients.append(gradients)
        self.times.append(now)
        self.consensus_distance.append(consensus_distance)
        self.distance.append(distance)
        return not (consensus_distance < _DIVERGED and distance < _DIVERGED)


def _sum_of_squares(models: np.ndarray, mean: np.ndarray) -> float:
    """Return sum_i |x_i - mean|^2, computed in blocks that fit a cache."""
    rows = max(1, _BLOCK // models.shape[1])
    return sum(
        float(np.square(models[start : start + rows] - mean).sum())
        for start in range(0, len(models), rows)
    )
