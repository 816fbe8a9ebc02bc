"""Spectral gaps of mixing matrices: how fast gossip over a graph brings models together."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from mpi_dasgd.topology.topology import Topology

__all__ = ["spectral_gap"]

DENSE_RANKS = 1500
"""Ranks up to which a dense eigensolver is used; at the limit it takes about a second."""

LANCZOS_RESTARTS = 200
"""Restarts before Lanczos is given up; a random 3-regular graph of 65,536 ranks needs about 30."""


def spectral_gap(topology: Topology) -> float:
    """Return 1 - max(|lambda_2|, |lambda_n|) of the mixing matrix over the ranks not removed.

    0 if they are not connected, 1 if there is only one.
    """
    ranks = topology.remaining
    if len(ranks) == 1:
        return 1.0
    if topology.cayley is not None:
        generators = len(topology.cayley.generators)
        walk = (1.0 + topology.cayley.eigenvalues()) / (1.0 + generators)
        return float(1.0 - np.abs(walk).max())
    if not topology.is_connected:
        return 0.0
    return _gap_of_matrix(topology.mixing_matrix()[ranks][:, ranks])


def _gap_of_matrix(matrix: Any) -> float:
    """Return 1 - max(|lambda_2|, |lambda_n|) of a connected doubly stochastic matrix."""
    size = matrix.shape[0]
    if size <= DENSE_RANKS:
        values = np.linalg.eigvalsh(matrix.toarray())
        return float(1.0 - max(-values[0], values[-2]))
    deflated = LinearOperator((size, size), matvec=lambda x: matrix @ x - x.mean(), dtype=float)
    start = np.random.default_rng(0).standard_normal(size)
    options = {"return_eigenvectors": False, "v0": start}
    try:
        values = eigsh(
            deflated, k=1, which="LM", ncv=50, maxiter=LANCZOS_RESTARTS, tol=1e-8, **options
        )
        return float(1.0 - abs(values[0]))
    except ArpackNoConvergence:
        # Lanczos fails on graphs that mix slowly; most have small separators, so that a sparse
        # factorization at each end of the spectrum is cheap.
        top = eigsh(matrix.tocsc(), k=2, sigma=1.0 + 1e-6, **options).min()
        bottom = eigsh(matrix.tocsc(), k=1, sigma=-1.0 - 1e-6, tol=1e-4, **options).min()
        return float(1.0 - max(top, -bottom))
