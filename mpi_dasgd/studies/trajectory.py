"""Simulated runs of a study: their configurations, and the trajectory of the mean model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.config.schema import Config
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.tasks.convex import Problem

__all__ = [
    "Trajectory",
    "configure",
    "first_time_below",
    "simulate_trajectory",
    "time_until_stays_below",
    "vary",
]

BASE: dict[str, Any] = {
    "task.name": "quadratic",
    "task.batch_size": 1,  # one gradient is one sample of the budget
    "optimizer.options": {},
    "codec.name": "none",
    "simulation.condition": 1.0,
}


def configure(keys: Mapping[str, Any]) -> Config:
    """Return the base of all studies with other values, as in ``{"algorithm.name": "swarm"}``."""
    return _merge({}, BASE | dict(keys))


def vary(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return `config` with other values, as `configure` takes them."""
    return _merge(config.model_dump(), keys)


def _merge(data: dict[str, Any], keys: Mapping[str, Any]) -> Config:
    for name, value in keys.items():
        section, _, key = name.partition(".")
        data.setdefault(section, {})[key] = value
    return Config.model_validate(data)


@dataclass(frozen=True)
class Trajectory:
    """What a simulated run was at each sample of its trace.

    Attributes:
        problem: what the run minimized.
        metrics: as `simulate --json` prints them.
        counts: gradients computed, (samples,), ascending.
        times: virtual time, (samples,).
        means: mean model, (samples, elements).
        models: models of all ranks, (samples, ranks, elements); no samples unless they were kept.
        consensus_distance: mean_i |x_i - mean|^2, (samples,).
        delays: gradients of other ranks while each gradient was computed, (gradients,).
    """

    problem: Problem
    metrics: dict[str, Any]
    counts: np.ndarray
    times: np.ndarray
    means: np.ndarray
    models: np.ndarray
    consensus_distance: np.ndarray
    delays: np.ndarray

    @property
    def grad_norm_sq(self) -> np.ndarray:
        """|grad f(mean)|^2, (samples,)."""
        return np.array([np.square(self.problem.full_gradient(x)).sum() for x in self.means])

    @property
    def excess(self) -> np.ndarray:
        """f(mean) - f(optimum), (samples,)."""
        least = self.problem.value(self.problem.optimum)
        return np.array([self.problem.value(x) - least for x in self.means])

    @property
    def distances(self) -> np.ndarray:
        """|mean - optimum|^2, (samples,)."""
        return np.square(self.means - self.problem.optimum).sum(1)


def simulate_trajectory(
    config: Config,
    every: int,
    *,
    until: float = -1.0,
    keep_models: bool = False,
    on_exchange: Callable[[ExchangeRecord], None] | None = None,
) -> Trajectory:
    """Run a simulation and return its trajectory.

    Args:
        config: what to simulate; its budget is a multiple of `every` gradients.
        every: gradients between two samples.
        until: end the run when |mean - optimum|^2 is at or below this.
        keep_models: whether to keep the models of all ranks, not only their mean.
        on_exchange: called with every exchange.
    """
    means: list[np.ndarray] = []
    models: list[np.ndarray] = []

    def keep(run: Simulator) -> None:
        means.append(run.mean_model())
        if keep_models:
            models.append(run.models.astype(np.float64))
        if run.trace.distance[-1] <= until:
            run.stop()

    run = Simulator(config, sample_every=every, on_sample=keep, on_exchange=on_exchange)
    metrics = run.run()
    counts = np.array(run.trace.gradients)
    # In a synchronous step every rank leaves a sample: the last one is that of the whole step.
    kept = np.append(counts[1:] != counts[:-1], True)
    if not run.diverged:
        # The sample at the end waited for gradients that came too late.
        kept[-2:] = (True, False)
    return Trajectory(
        problem=run.problem,
        metrics=metrics,
        counts=counts[kept],
        times=np.array(run.trace.times)[kept],
        means=np.array(means)[kept],
        models=np.array(models)[kept] if keep_models else np.empty((0, *run.models.shape)),
        consensus_distance=np.array(run.trace.consensus_distance)[kept],
        delays=np.array(run.meter.delays),
    )


def first_time_below(x: np.ndarray, values: np.ndarray, epsilon: float) -> float | None:
    """Return the first `x` at which `values` is at or below `epsilon`; None if it never is.

    Between samples log(values) is taken as a straight line.

    Args:
        x: (samples,), ascending.
        values: (samples,).
        epsilon: level, above 0.
    """
    below = np.flatnonzero(values <= epsilon)
    if not below.size:
        return None
    return _crossing(x, values, int(below[0]), epsilon)


def time_until_stays_below(x: np.ndarray, values: np.ndarray, epsilon: float) -> float | None:
    """Return the `x` from which `values` stays at or below `epsilon`; None if it ends above.

    Args and interpolation are those of `first_time_below`.
    """
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
