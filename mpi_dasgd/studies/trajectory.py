"""One simulated run of a study: configurations made in code, and the course of the mean model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpi_dasgd.config.schema import Config
from mpi_dasgd.simulation.simulator import Simulator

__all__ = ["Trajectory", "configure", "first_time_below", "time_until_stays_below", "vary"]

BASE: dict[str, Any] = {
    "task.name": "quadratic",
    "task.batch_size": 1,  # one gradient is one sample of the budget
    "optimizer.options": {},
    "codec.name": "none",
    "simulation.condition": 1.0,
}


def configure(keys: Mapping[str, Any]) -> Config:
    """Return a configuration: the base of all studies with `keys`, as in ``{"algorithm.name": "swarm"}``."""
    return _merge({}, BASE | dict(keys))


def vary(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return `config` with other values of some keys."""
    return _merge(config.model_dump(), keys)


def _merge(data: dict[str, Any], keys: Mapping[str, Any]) -> Config:
    for name, value in keys.items():
        section, _, key = name.partition(".")
        data.setdefault(section, {})[key] = value
    return Config.model_validate(data)


class Trajectory(Simulator):
    """A simulation that has run, and the mean model at each sample of its trace.

    Args:
        config: what to simulate; its budget is a multiple of `every` gradients.
        every: gradients between two samples.
        until: end the run when |mean - optimum|^2 is at or below this.
        ranks: whether to keep all models, not only their mean.

    Attributes:
        counts: gradients computed, per sample, ascending, (samples,).
        times: virtual time of each sample.
        means: mean model at each sample, (samples, d).
        ranks: all models at each sample, (samples, n, d), if wanted.
        consensus_distance: mean_i |x_i - mean|^2 at each sample.
        figures: as `simulate --json` prints them.
    """

    def __init__(
        self, config: Config, every: int, until: float = -1.0, ranks: bool = False
    ) -> None:
        super().__init__(config)
        self._until = until
        self._keep = ranks
        self._all: list[np.ndarray] = []
        self.sample_every = every
        self._means: list[np.ndarray] = []
        self.figures = self.run()
        counts = np.array(self.trace.gradients)
        # In a synchronous step every rank leaves a sample: the last one is that of the whole step.
        keep = np.append(counts[1:] != counts[:-1], True)
        if not self.diverged:
            keep[-2:] = (
                True,
                False,
            )  # the one at the end has waited for gradients that come too late
        self.counts = counts[keep]
        self.times = np.array(self.trace.times)[keep]
        self.consensus_distance = np.array(self.trace.consensus_distance)[keep]
        self.means = np.array(self._means)[keep]
        self.ranks = np.array(self._all)[keep] if ranks else np.empty((0, *self.models.shape))

    def _sample(self) -> None:
        super()._sample()
        self._means.append(self.mean_model())
        if self._keep:
            self._all.append(self.models.astype(np.float64))
        if self.trace.distance[-1] <= self._until:
            self.max_gradients = self.gradients

    @property
    def grad_norm_sq(self) -> np.ndarray:
        """|grad f(mean)|^2 at each sample."""
        return np.array([np.square(self.problem.full_gradient(x)).sum() for x in self.means])

    @property
    def excess(self) -> np.ndarray:
        """f(mean) - f(optimum) at each sample."""
        least = self.problem.value(self.problem.optimum)
        return np.array([self.problem.value(x) - least for x in self.means])

    @property
    def distances(self) -> np.ndarray:
        """|mean - optimum|^2 at each sample."""
        return np.square(self.means - self.problem.optimum).sum(1)


def first_time_below(x: np.ndarray, values: np.ndarray, epsilon: float) -> float | None:
    """Return where `values`, a course over `x`, first falls to `epsilon`; None if it never does.

    Between samples log(values) is a straight line.
    """
    below = np.flatnonzero(values <= epsilon)
    if not below.size:
        return None
    return _crossing(x, values, int(below[0]), epsilon)


def time_until_stays_below(x: np.ndarray, values: np.ndarray, epsilon: float) -> float | None:
    """Return from where on `values` stays at or below `epsilon`; None if it ends above it."""
    above = np.flatnonzero(~(values <= epsilon))
    after = int(above[-1]) + 1 if above.size else 0
    if after == len(values):
        return None
    return _crossing(x, values, after, epsilon)


def _crossing(x: np.ndarray, values: np.ndarray, after: int, epsilon: float) -> float:
    if after == 0:
        return float(x[0])
    high, low = np.log(values[after - 1]), np.log(max(float(values[after]), 1e-300))
    share = (high - np.log(epsilon)) / (high - low) if high > low else 1.0
    return float(x[after - 1] + share * (x[after] - x[after - 1]))
