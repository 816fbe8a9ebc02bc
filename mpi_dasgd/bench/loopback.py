"""Pair averaging of a rank with itself: the whole work of an exchange, in one process."""

from __future__ import annotations

import time

from mpi_dasgd.algorithms.adpsgd import ADPSGD
from mpi_dasgd.algorithms.base import LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities
from mpi_dasgd.algorithms.pair_averaging import PairExchange

__all__ = ["Loopback"]


class _OwnExchange(PairExchange):
    """Pair averages with this rank's own publication and inbox."""

    def _draw(self) -> list[int]:
        return [self._endpoint.rank]


class Loopback(ADPSGD):
    """AD-PSGD whose only neighbour is the rank itself.

    Each exchange absorbs the delta of the one before, averages with the model that was published
    then, writes a delta to the own inbox, and publishes: all that an exchange with another rank of
    this machine does. The sum of model and delta is conserved, so that it trains as without.

    Attributes:
        every: steps from one exchange to the next; 0: none.
        catch_up_seconds: time for which the host has waited for the device before it claimed.
    """

    name = "loopback"
    capabilities = Capabilities(runs_on_device=ADPSGD.capabilities.runs_on_device)
    every = 1
    catch_up_seconds = 0.0

    def start(self) -> None:
        """Publish the initial model."""
        self._pairs = _OwnExchange(self)
        self.restart(0)

    def advance(self, local: LocalOptimizer) -> None:
        """Apply one gradient, and exchange if it is time."""
        local.apply()
        if self.every and local.local_step % self.every == 0:
            started = time.perf_counter()
            self.endpoint.catch_up()  # the exchange then finds that it need not wait
            self.catch_up_seconds += time.perf_counter() - started
            self._pairs.exchange(self.x, local.local_step, publish_result=True)
