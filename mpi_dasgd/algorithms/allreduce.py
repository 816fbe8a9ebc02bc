"""Synchronous data-parallel SGD: the gradients of all ranks are averaged in every step.

1. average:  g <- (1/n) sum_j g_j(x)
2. apply:    x <- x - eta g, the same x on all ranks
"""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.transport.endpoint import Request

__all__ = ["AllReduce"]


class AllReduce(Algorithm):
    """Mini-batch SGD with the union of all ranks' batches, as in PyTorch DDP or Horovod."""

    name = "allreduce"
    description = Description(
        paper="large-batch SGD",
        exchanges="gradients",
        traffic="2 M (n-1)/n",
        memory="0",
        waits="every step",
    )
    capabilities = Capabilities(
        synchronous=True,
        one_model=True,
        replicated=True,
        uses_publication=False,
        uses_inbox=False,
        exchanges_gradients=True,
    )

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Average the gradients and apply the mean."""
        gradient = local.gradient
        yield from wait(self.endpoint.allreduce(gradient))  # 1
        gradient /= self.endpoint.size
        local.apply()  # 2
