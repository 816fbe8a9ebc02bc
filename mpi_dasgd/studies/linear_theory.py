"""Consensus distance of SwarmSGD by linear analysis: second moments of pair averages, exactly."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mpi_dasgd import topology

__all__ = ["drift", "laplacian", "noise", "relaxations"]

ITERATIONS = 400
"""Iterations of the fixed point in `noise`; a ring of 32 ranks needs about 100 for 10 digits."""


@lru_cache
def laplacian(graph: str, ranks: int, degree: int | None, seed: int) -> np.ndarray:
    """Return the Laplacian of a regular graph, (ranks, ranks)."""
    matrix = np.zeros((ranks, ranks))
    edges = topology.build(graph, ranks, degree=degree, seed=seed).edges
    for i, j in edges.tolist():
        matrix[[i, j], [j, i]] -= 1
        matrix[[i, j], [i, j]] += 1
    return matrix


def relaxations(laplacian: np.ndarray) -> np.ndarray:
    """Return r / lambda_k of the modes that pair averages contract, (n - 1,), slowest first."""
    return laplacian[0, 0] / np.linalg.eigvalsh(laplacian)[1:]


def noise(laplacian: np.ndarray) -> float:
    """Return tr(S) / n in steady state, if each interaction adds variance 1 to its initiator.

    With a uniformly drawn edge and W = I - d d^T / 2, the second moments S of the models around
    their mean obey S = E[W S W] + (I - J) / n, that is
    (L S + S L) / 2 = m (I - J) / n + 1/4 sum_edges (d^T S d) d d^T.
    """
    size = len(laplacian)
    edges = np.trace(laplacian) / 2
    values, modes = np.linalg.eigh(laplacian)
    sums = (values[:, None] + values) / 2
    sums[0, 0] = np.inf  # the mean is left out
    adjacency = np.diag(np.diag(laplacian)) - laplacian
    added = edges * (np.eye(size) - 1 / size) / size
    moments = np.zeros_like(laplacian)
    for _ in range(ITERATIONS):
        own = np.diag(moments)
        weights = adjacency * (own[:, None] + own - 2 * moments)
        total = added + (np.diag(weights.sum(1)) - weights) / 4
        moments = modes @ ((modes.T @ total @ modes) / sums) @ modes.T
    return float(np.trace(moments) / size)


def drift(laplacian: np.ndarray, pull: float, minima: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean models c in steady state, and b - c to their minima, (n, d) each.

    A phase moves x_i by pull (b_i - x_i), the averages of a phase move it by -L x / r; hence
    c = pull (L / r + pull)^-1 b.

    Args:
        laplacian: Laplacian L of an r-regular graph, (n, n).
        pull: eta H.
        minima: b_i, (n, d), of mean 0.
    """
    walk = laplacian / laplacian[0, 0]
    models = np.linalg.solve(walk + pull * np.eye(len(walk)), pull * minima)
    return models, minima - models
