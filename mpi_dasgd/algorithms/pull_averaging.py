"""Pull averaging: the average with a neighbour's publication that changes the reader only.

    y_i <- y_i + w (ŷ_j - y_i),  j uniform among the neighbours

The publication is copied without a claim, so that it may serve any number of readers, and its owner
does not know of them. The sum of the vectors is *not* conserved: `adpsgd_pull` and `swarm_pull` say
what that costs. No rank waits: a copy that the network has not delivered yet is used at the next
average.
"""

from __future__ import annotations

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm
from mpi_dasgd.algorithms.communication import publish
from mpi_dasgd.algorithms.neighbour_exchange import NeighbourExchange
from mpi_dasgd.algorithms.records import INITIATED
from mpi_dasgd.codecs import ExchangeBuffers, Message, Outcome
from mpi_dasgd.transport.endpoint import ReadRequest

__all__ = ["PullExchange"]


class PullExchange(NeighbourExchange):
    """One rank's pull averages. It never waits."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        self._request: ReadRequest | None = None  # started, and not settled when last tested
        self._candidate: int | None = None  # neighbour of the next average, if drawn already

    def average(self, y: np.ndarray, step: int, *, publish_result: bool) -> None:
        """Average with one neighbour's publication, and publish if wanted, in one pass over memory.

        Args:
            y: own vector, shape (elements,), contiguous; changed in place.
            step: own local step, for the record.
            publish_result: whether to publish `y`; otherwise the caller does so.
        """
        endpoint = self._endpoint
        request = self._request or self._read(self._draw())
        was_late = request is self._request
        settled = request.is_settled  # read once: the progress thread may settle it at any moment
        partner_model = request.message if settled else None
        slot = endpoint.publication.reserve() if publish_result else None
        buffers = ExchangeBuffers(
            partner_model=partner_model, weight=self._settings.mixing_weight, publication=slot
        )
        outcome = self._codec.average_pair(y, buffers)
        publish(endpoint, slot, step)
        if settled:
            self._record_read(partner_model, step, outcome)
        self._request = None if settled else request
        if was_late and settled:
            # The copy took longer than a step: read ahead, so that one is ready at the next.
            self._candidate = self._draw()
            if self._candidate is not None and not endpoint.is_local(self._candidate):
                self._request = self._read(self._draw())

    def discard(self) -> None:
        """Discard a copy that was asked for: the model is older than what all ranks have now."""
        self._request = None

    def _draw(self) -> int | None:
        """Return the next neighbour to read, None if all are gone."""
        drawn, self._candidate = self._candidate, None
        neighbours = self._endpoint.neighbours()
        return self._rng.choice(neighbours) if drawn is None and neighbours else drawn

    def _read(self, rank: int | None) -> ReadRequest:
        if rank is not None:
            return self._endpoint.read(rank)
        nothing = ReadRequest(-1)
        nothing.is_settled = True
        return nothing

    def _record_read(self, partner_model: Message | None, step: int, outcome: Outcome) -> None:
        """Record an average, or that there was nothing to read."""
        if partner_model is None:
            self._records.skipped(step)
            return
        header = partner_model.header
        self._records.message(INITIATED, step, header, nbytes=header.nbytes, outcome=outcome)
