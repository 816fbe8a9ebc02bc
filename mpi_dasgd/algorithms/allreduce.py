"""Synchronous data-parallel SGD: the gradients of all ranks are averaged in every step."""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm, Local
from mpi_dasgd.transport.endpoint import Pending

__all__ = ["AllReduce"]


class AllReduce(Algorithm):
    """Mini-batch SGD with the union of all ranks' batches, as by PyTorch DDP or Horovod."""

    name = "allreduce"
    paper = "large-batch SGD"
    exchanges = "gradients"
    traffic = "2 M (n-1)/n"
    memory = "0"
    waits = "every step"
    synchronous = True
    publishes = False
    receives = False

    def step(self, local: Local) -> Iterator[Pending]:
        """x <- x - eta (1/n) sum_j g_j(x), the same x on all ranks."""
        gradient = local.gradient
        total = self.endpoint.allreduce(gradient)
        while not total.done():
            yield total
        gradient /= self.endpoint.size
        local.update()
