"""Local SGD: H local steps, then the exact mean of all models (Stich; ICLR 2019; arXiv 1805.09767).

Known as FedAvg where the ranks are clients with data of their own (McMahan et al. 2017).

1. local:    x_i <- x_i - eta g_i(x_i), H times (`local_steps`)
2. average:  x_i <- (1/n) sum_j x_j

With H = 1 and plain SGD this is `allreduce`, to rounding. Optimizer state is not averaged: momentum
stays with its rank. If the number of steps is no multiple of H, ranks end with models of their own;
the run returns their mean.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.transport.endpoint import Request

__all__ = ["LocalSGD"]


class LocalSGD(Algorithm):
    """Exact averages of the models, every H steps."""

    name = "local_sgd"
    description = Description(
        paper="Stich 2019, arXiv 1805.09767",
        exchanges="models, summed over all ranks",
        traffic="2 M (n-1)/n / H",
        memory="0",
        waits="every H steps",
    )
    capabilities = Capabilities(synchronous=True, uses_publication=False, uses_inbox=False)
    config_keys = ("local_steps",)

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Make one local step; average after every H steps."""
        local.apply()  # 1
        if local.local_step % self.settings.local_steps == 0:  # 2
            yield from wait(self.endpoint.allreduce(self.x))
            self.x /= self.endpoint.size
