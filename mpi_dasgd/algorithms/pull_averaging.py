"""Pulling: the average of a vector with a neighbour's publication, that changes the reader only.

    y_i <- y_i + w (ŷ_j - y_i),  j uniform among the neighbours

The publication is copied without a claim, so that it may serve any number of readers, and its owner never
knows. The sum of the vectors is *not* conserved: see `adpsgd_pull` and `swarm_pull` for what that costs.
Nobody waits: a copy that the network has not brought yet is used at the next average.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from mpi_dasgd.algorithms.base import INITIATED, SKIPPED, ExchangeRecord
from mpi_dasgd.algorithms.pair_averaging import announce
from mpi_dasgd.codecs import Codec, ExchangeBuffers, ExchangeOutcome, Message
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.transport.endpoint import Endpoint, ReadRequest

__all__ = ["PullExchange"]


class PullExchange:
    """One rank's averages. It never waits.

    Args:
        endpoint, codec, rng, record: of the algorithm.
        settings: section ``algorithm``: `mixing_weight` counts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        codec: Codec,
        settings: Settings,
        rng: random.Random,
        record: Callable[[ExchangeRecord], None],
    ) -> None:
        self._endpoint = endpoint
        self._codec = codec
        self._settings = settings
        self._rng = rng
        self._record = record
        self._reading: ReadRequest | None = None  # asked for, and not settled when last seen
        self._candidates: int | None = None  # neighbour of the next average, if drawn already

    def average(self, y: np.ndarray, step: int, *, publish: bool) -> None:
        """Average with one neighbour's publication, and publish if wanted, in one pass over memory.

        Args:
            y: own vector, 1-D, contiguous; changed in place.
            step: own step, for the record.
            publish: else the caller does.
        """
        endpoint = self._endpoint
        reading = self._reading or self._ask(self._draw())
        late = reading is self._reading
        settled = reading.is_settled  # once: the courier may settle it at any moment
        theirs = reading.message if settled else None
        publication = endpoint.publication.reserve() if publish else None
        outcome = self._codec.average_pair(
            y,
            ExchangeBuffers(
                partner_model=theirs, weight=self._settings.mixing_weight, publication=publication
            ),
        )
        announce(endpoint, publication, step)
        if settled:
            self._record_read(theirs, step, outcome)
        self._reading = None if settled else reading
        if late and settled:
            # The copy took longer than a moment: ask ahead, so that there is one at the next average.
            self._candidates = self._draw()
            if self._candidates is not None and not endpoint.is_local(self._candidates):
                self._reading = self._ask(self._draw())

    def _draw(self) -> int | None:
        """The next neighbour to read; None if all are gone."""
        drawn, self._candidates = self._candidates, None
        neighbours = self._endpoint.neighbours()
        return self._rng.choice(neighbours) if drawn is None and neighbours else drawn

    def _ask(self, rank: int | None) -> ReadRequest:
        if rank is not None:
            return self._endpoint.read(rank)
        nobody = ReadRequest(-1)
        nobody.is_settled = True
        return nobody

    def _record_read(self, theirs: Message | None, step: int, outcome: ExchangeOutcome) -> None:
        """Record an average, or that there was nothing to read."""
        if theirs is None:
            self._endpoint.counters.skipped += 1
            self._record(ExchangeRecord(step, -1, SKIPPED, -1, 0.0, 0, 0))
            return
        header = theirs.header
        age = (self._endpoint.time_ns() - header.time_ns) * 1e-9
        self._record(
            ExchangeRecord(
                step, header.rank, INITIATED, header.step, age, header.nbytes, 0, *outcome
            )
        )

    def publish(self, y: np.ndarray, step: int) -> None:
        """Publish a vector outside of an average."""
        publication = self._endpoint.publication.reserve()
        if publication is not None:
            self._codec.encode(y, publication)
            announce(self._endpoint, publication, step)
