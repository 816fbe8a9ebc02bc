"""Version vectors: how far the gradient sets of two replicas differ.

After Tosi and Theobald (2023; arXiv 2309.03754).

G_i is the set of gradients in replica i, V_i[k] the number of them that rank k computed. The
gradients of each source are applied in its order, so that the sets are prefixes, and exactly

    S(i, j) = |G_i ^ G_j| = sum_k |V_i[k] - V_j[k]|.

S_avg and S_max are the mean and the largest S(i, j) over the instants at which a rank i has ended a
step (its own gradient and those that had arrived are in x_i, and its next one begins), and over all
other ranks j. Beside them, as the concurrency of Koloskova et al. (2022; arXiv 2206.08307) for
replicas,

    U_i = sum_k (V_k[k] - V_i[k]):

gradients computed anywhere that x_i lacks, at the same instants.

Which pairs and instants the paper's own S_avg means, and its looser variants, was not verified.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["SetStaleness"]


class SetStaleness:
    """Meter of S, and of U.

    Args:
        versions: V of every rank, (ranks,) int64 each; the current values are read at each sample.

    Attributes:
        samples: number of instants so far.
        maximum: S_max so far, in gradients.
    """

    def __init__(self, versions: Sequence[np.ndarray] | np.ndarray) -> None:
        self._versions = versions
        self._sum = 0
        self.samples = self.maximum = 0

    def update(self, rank: int) -> tuple[np.ndarray, int]:
        """Measure at the end of a step of `rank`.

        Returns:
            S between `rank` and each rank, (ranks,), and U of `rank`.
        """
        table = np.asarray(self._versions)
        staleness = np.abs(table - table[rank]).sum(1)
        missing = int((table.max(0) - table[rank]).sum())  # no rank has more of k's than k
        self.samples += 1
        self._sum += int(staleness.sum())
        self.maximum = max(self.maximum, int(staleness.max()))
        return staleness, missing

    @property
    def average(self) -> float:
        """S_avg so far, in gradients; NaN before the first sample."""
        pairs = self.samples * (len(self._versions) - 1)
        return self._sum / pairs if pairs else float("nan")
