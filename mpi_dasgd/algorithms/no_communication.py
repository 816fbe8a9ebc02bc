"""Ranks that never exchange anything: the reference of every benchmark."""

from __future__ import annotations

from mpi_dasgd.algorithms.asynchronous import AsynchronousAlgorithm
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description

__all__ = ["Alone"]


class Alone(AsynchronousAlgorithm):
    """n independent runs of SGD from the same weights."""

    name = "alone"
    description = Description(
        paper="none: the reference",
        exchanges="nothing",
        traffic="0",
        memory="0",
        waits="never",
    )
    capabilities = Capabilities(uses_publication=False, uses_inbox=False)

    def advance(self, local: LocalOptimizer) -> None:
        """Apply one gradient: x_i <- x_i - eta g_i(x_i)."""
        local.apply()
