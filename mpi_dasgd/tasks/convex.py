"""Convex problems for the simulator: quadratics, and logistic regression with a known optimum."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.tasks import tables

__all__ = ["BreastCancer", "Problem", "Quadratic", "build"]


class Problem(Protocol):
    """Minimization of f(x) = mean_i f_i(x) over the ranks i that compute gradients.

    Attributes:
        start: initial model, (d,) float64.
        optimum: minimizer of f, (d,) float64.
    """

    start: np.ndarray
    optimum: np.ndarray

    def gradient(self, rank: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a stochastic gradient of f_rank at `x`, both (d,), drawn with `rng`."""

    def value(self, x: np.ndarray) -> float:
        """Return f(x)."""

    def full_gradient(self, x: np.ndarray) -> np.ndarray:
        """Return the exact gradient of f at `x`, (d,)."""


class Quadratic:
    """f_i(x) = 1/2 sum_k c_k (x_k - b_ik)^2 with curvatures c between 1/condition and 1.

    Args:
        ranks: number of functions.
        dimension: d.
        condition: largest over smallest curvature; the curvatures are spaced geometrically.
        heterogeneity: standard deviation of the minima b_i around their mean, which is 0.
        noise: standard deviation of the noise of each gradient coordinate.
        seed: seed of the start and the minima.
        workers: ranks that compute gradients; None for all.
    """

    def __init__(
        self,
        ranks: int,
        dimension: int,
        condition: float = 1.0,
        heterogeneity: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        workers: range | None = None,
    ) -> None:
        rng = np.random.default_rng([seed, 1])
        self.curvature = np.geomspace(1.0, 1.0 / condition, dimension)
        self.start = 10 * rng.normal(size=dimension)
        self.optimum = np.zeros(dimension)
        self.noise = noise
        self._minima: np.ndarray | None = None
        if heterogeneity:
            minima = heterogeneity * rng.normal(size=(ranks, dimension))
            self._minima = minima - minima[workers or range(ranks)].mean(0)

    def gradient(self, rank: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        gradient = self.curvature * (x if self._minima is None else x - self._minima[rank])
        if self.noise:
            gradient += self.noise * rng.normal(size=x.size)
        return gradient

    def value(self, x: np.ndarray) -> float:
        """Return f(x) - f(optimum)."""
        return float(0.5 * self.curvature @ np.square(x))

    def full_gradient(self, x: np.ndarray) -> np.ndarray:
        return self.curvature * x


class BreastCancer:
    """L2-regularized logistic regression on scikit-learn's breast_cancer, standardized.

    f(x) = mean_m log(1 + exp(-y_m <a_m, x>)) + regularization/2 |x|^2; Newton's method finds the
    optimum when the problem is made. Rank i draws from the samples i, i + n, ... if `sharded`.

    Args:
        ranks: number of ranks, n.
        batch_size: samples per stochastic gradient; 0 takes all samples of the rank.
        regularization: weight of the L2 term; also makes the problem strongly convex.
        sharded: whether each rank has its own samples.
        workers: ranks that compute gradients and have samples; None for all.
    """

    def __init__(
        self,
        ranks: int,
        batch_size: int = 1,
        regularization: float = 0.01,
        sharded: bool = False,
        workers: range | None = None,
    ) -> None:
        features, labels = tables.breast_cancer()
        features = (features - features.mean(0)) / features.std(0)
        signed = np.hstack([features, np.ones((len(features), 1))]) * (2 * labels - 1)[:, None]
        self._all = signed
        parts = workers or range(ranks)
        self._shards = [signed] * ranks
        for part, rank in enumerate(parts if sharded else ()):
            self._shards[rank] = signed[part :: len(parts)]
        self._batch_size = batch_size
        self._regularization = regularization
        self.start = np.zeros(signed.shape[1])
        self.optimum = self._newton()

    def _newton(self) -> np.ndarray:
        x = self.start
        for _ in range(50):
            p = 1 / (1 + np.exp(self._all @ x))
            gradient = self._mean_gradient(self._all, x)
            weights = p * (1 - p) / len(self._all)
            hessian = (self._all.T * weights) @ self._all + self._regularization * np.eye(x.size)
            x = x - np.linalg.solve(hessian, gradient)
            if np.linalg.norm(gradient) < 1e-13:
                return x
        raise ArithmeticError("Newton's method on breast_cancer did not converge")

    def _mean_gradient(self, signed: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the gradient of the mean loss over the samples y_m a_m in the rows of `signed`."""
        p = 1 / (1 + np.exp(signed @ x))
        return -(p @ signed) / len(signed) + self._regularization * x

    def gradient(self, rank: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        shard = self._shards[rank]
        if self._batch_size:
            shard = shard[rng.integers(len(shard), size=self._batch_size)]
        return self._mean_gradient(shard, x)

    def value(self, x: np.ndarray) -> float:
        """Return f(x)."""
        loss = np.logaddexp(0, -(self._all @ x)).mean()
        return float(loss + 0.5 * self._regularization * x @ x)

    def full_gradient(self, x: np.ndarray) -> np.ndarray:
        return self._mean_gradient(self._all, x)

    def accuracy(self, x: np.ndarray) -> float:
        """Return the share of all samples that the model `x` classifies correctly."""
        return float(np.mean(self._all @ x > 0))


def build(config: Config, workers: range | None = None) -> Problem:
    """Make the problem of a configuration.

    Args:
        config: sections task and simulation, and run.seed, count.
        workers: ranks that compute gradients; None for all.

    Raises:
        UserError: the task is for real runs only.
    """
    simulation = config.simulation
    if config.task.name == "quadratic":
        return Quadratic(
            simulation.ranks,
            simulation.dimension,
            simulation.condition,
            simulation.heterogeneity,
            simulation.noise,
            config.run.seed,
            workers,
        )
    if config.task.name == "breast_cancer":
        return BreastCancer(
            simulation.ranks,
            config.task.batch_size,
            sharded=config.task.data == "sharded",
            workers=workers,
        )
    raise UserError(
        f"task.name: `simulate` knows quadratic and breast_cancer, got {config.task.name!r}; "
        "use `train` for the others"
    )
