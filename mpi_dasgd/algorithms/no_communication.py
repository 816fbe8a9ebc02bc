"""Ranks that never exchange anything: what every benchmark compares with."""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import Algorithm, Local
from mpi_dasgd.transport.endpoint import Request

__all__ = ["Alone"]


class Alone(Algorithm):
    """n independent runs of SGD from the same weights."""

    name = "alone"
    paper = "none: the reference"
    exchanges = "nothing"
    traffic = "0"
    memory = "0"
    waits = "never"
    publishes = False
    receives = False

    def step(self, local: Local) -> Iterator[Request]:
        """x_i <- x_i - eta g_i(x_i)."""
        local.update()
        return
        yield
