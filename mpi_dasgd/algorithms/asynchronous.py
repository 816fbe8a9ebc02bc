"""Base of the algorithms whose ranks never wait for each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import final

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.transport.endpoint import Request

__all__ = ["AsynchronousAlgorithm"]


class AsynchronousAlgorithm(Algorithm):
    """Base of algorithms that never wait: a plain method instead of a generator makes a step."""

    @abstractmethod
    def advance(self, local: LocalOptimizer) -> None:
        """Make one step; called when a gradient is ready."""

    @final
    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Make one step; there is nothing to wait for."""
        self.advance(local)
        return iter(())
