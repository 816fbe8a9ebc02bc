"""Trace: how far the models of a simulation are from each other and from the optimum, as it goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Trace"]

_BLOCK = 1 << 16  # elements
_DIVERGED = 1e12  # squared distance from which a run counts as diverged


@dataclass
class Trace:
    """What a simulation measured.

    Attributes:
        gradients: number of gradients computed, per sample of the lists below.
        times: virtual time.
        consensus_distance: mean_i |x_i - mean|^2.
        distance: |mean - optimum|^2, the mean of the models that are trained.
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
            gradients, now: see the lists.
            models: (ranks, elements).
            trained: the model that is trained, (elements,).
            optimum: (elements,).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            disagreement = _consensus_distance(models, models.mean(0)) / len(models)
            distance = float(np.square(trained - optimum).sum())
        self.gradients.append(gradients)
        self.times.append(now)
        self.consensus_distance.append(disagreement)
        self.distance.append(distance)
        return not (disagreement < _DIVERGED and distance < _DIVERGED)


def _consensus_distance(models: np.ndarray, mean: np.ndarray) -> float:
    """Return sum_i |x_i - mean|^2, by blocks that stay in a cache."""
    rows = max(1, _BLOCK // models.shape[1])
    return sum(
        float(np.square(models[start : start + rows] - mean).sum())
        for start in range(0, len(models), rows)
    )
