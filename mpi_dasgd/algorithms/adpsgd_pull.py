"""What most frameworks call AD-PSGD: read a neighbour's model and move half-way to it.

It is not the algorithm of the paper. KungFu's PairAveragingOptimizer is the best-known example. A
rank reads; its neighbour neither moves nor knows of it:

1. average:  x_i <- x_i + w (x̂_j - x_i),  j a uniform neighbour, x̂_j its newest publication
2. apply:    x_i <- x_i - eta g_i, g_i computed before the average
3. publish:  x_i

W_k is then row- but not doubly stochastic. The mean of the models is not conserved: it does a
random walk with E|mean' - mean|^2 = Gamma / (2 n^2 (n-1)) per event. Gamma = sum_i |x_i - mean|^2
contracts half as fast as with `pair` (1 - 1/(2(n-1)) - 1/(2n(n-1)) against 1 - 1/(n-1) on the
complete graph), and the consensus distance and the noise of the mean are about twice as large.

With `algorithm.order` = adapt_then_combine it is 2, 1, publish, in one pass. Then half of every
gradient is lost: the effective step is 0.51, not 1. Both figures are for memoryless compute times.
With even ones the models that a rank reads are half a step ahead of its own, and the steps are
1/(1 - (1 - cv^2)/4) times as large, cv being the coefficient of variation of the compute times:
1.33 and 0.67 if they are constant. The average that conserves the mean (`pair`) does not depend on
the timing.
"""

from __future__ import annotations

from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.algorithms.pull_averaging import PullExchange

__all__ = ["PullADPSGD"]


class PullADPSGD(AsynchronousAlgorithm):
    """Averaging in which only the reader moves."""

    name = "adpsgd"
    variant = "pull"
    description = Description(
        paper="KungFu and others, not Lian et al.",
        exchanges="models, read by one side: the mean is not conserved",
        traffic="M / H",
        memory="5 M",
        waits="never",
        effective_step="1 to 1.33; with order = adapt_then_combine 0.51 to 0.67",
    )
    capabilities = Capabilities(preserves_mean=False, uses_inbox=False, minimum_ranks=2)
    config_keys = ("order", "local_steps", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Publish the initial model."""
        self._pulls = PullExchange(self)
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a model that is not the result of a step."""
        self._pulls.publish(self.x, step)

    def reset(self, step: int) -> None:
        """Publish the model, and use no older one."""
        self._pulls.discard()
        self.restart(step)

    def advance(self, local: LocalOptimizer) -> None:
        """Apply one gradient, and average after every `local_steps` gradients."""
        if local.local_step % self.settings.local_steps:
            local.apply()  # 2
        elif self.settings.order == "adapt_then_combine":
            local.apply()  # 2
            self._pulls.average(self.x, local.local_step, publish_result=True)  # 1, 3
        else:
            self._pulls.average(self.x, local.local_step, publish_result=False)  # 1
            local.apply()  # 2
            self._pulls.publish(self.x, local.local_step)  # 3
