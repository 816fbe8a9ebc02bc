"""Ranks that never exchange anything: what every benchmark compares with."""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.transport.endpoint import Request

__all__ = ["Alone"]


class Alone(Algorithm):
    """n independent runs of SGD from the same weights."""

    name = "alone"
    description = Description(
        paper="none: the reference",
        exchanges="nothing",
        traffic="0",
        memory="0",
        waits="never",
    )
    capabilities = Capabilities(
        uses_publication=False,
        uses_inbox=False,
    )

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """x_i <- x_i - eta g_i(x_i)."""
        local.apply()
        return
        yield
