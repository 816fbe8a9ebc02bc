"""Pairing: the average of a vector with a neighbour's publication, that changes both sides alike.

1. absorb:   y_i <- y_i + sum of the deltas in the inbox
2. claim:    the publication ŷ_j of a neighbour j, and a slot of j's inbox; if either is taken try another
             neighbour, `max_attempts` in all, else skip this exchange
3. average:  d = w (ŷ_j - y_i);  y_i <- y_i + d;  send -d to j
4. publish:  y_i, last

Nobody waits: a claim that the network has not answered yet is used at the next exchange. Both sides move
by the same amounts, so that the sum of all vectors and of the deltas on their way stays what it is. A
publication serves *one* exchange. Without that the fast ranks all correct towards the same stale model of
a straggler, their deltas add up, and the run diverges (`tests/simulation/test_simulator.py` shows it).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from mpi_dasgd.algorithms.base import ABSORBED, INITIATED, SKIPPED, ExchangeRecord
from mpi_dasgd.codecs import Codec, ExchangeBuffers, ExchangeOutcome, Message
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.transport.endpoint import Endpoint, ExchangeRequest, Request
from mpi_dasgd.transport.inbox import ReceivedMessage

__all__ = ["PAIR_CODECS", "PairExchange", "announce"]

PAIR_CODECS = ("lattice8", "none", "bf16", "fp16", "lattice4", "lattice16", "qsgd8")
"""Codecs for models that are averaged with a neighbour's, the default first."""


def announce(endpoint: Endpoint, publication: Message | None, step: int) -> None:
    """Publish what was written to a slot that `reserve` returned; None: there was no slot."""
    if publication is not None:
        publication.stamp(rank=endpoint.rank, step=step, time_ns=endpoint.time_ns())
        endpoint.publication.publish()


class PairExchange:
    """One rank's exchanges. It never waits.

    Args:
        endpoint, codec, rng, record: of the algorithm.
        settings: section ``algorithm``: `max_attempts` and `mixing_weight` count.
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
        self._request: ExchangeRequest | None = None  # asked for, and not settled when last seen
        self._candidates: list[int] = []  # candidates of the next exchange, if drawn already

    def exchange(self, y: np.ndarray, step: int, *, publish: bool) -> None:
        """Absorb, average, and publish if wanted, in one pass over memory.

        Args:
            y: own vector, 1-D, contiguous; changed in place.
            step: own step, for the record.
            publish: else the caller does, when it has changed `y` further.
        """
        endpoint = self._endpoint
        arrivals = endpoint.inbox.receive()  # 1
        pairing = self._request or endpoint.begin_exchange(self._draw())  # 2
        publication = endpoint.publication.reserve() if publish else None
        settled = pairing.is_settled  # once: the courier may settle it at any moment
        outcome = self._codec.average_pair(  # 1, 3 and 4 in one pass
            y,
            ExchangeBuffers(
                deltas=[arrival.message for arrival in arrivals],
                partner_model=pairing.partner_model if settled else None,
                weight=self._settings.mixing_weight,
                reply_delta=pairing.partner_delta if settled else None,
                publication=publication,
            ),
        )
        self._free(arrivals, step)
        if settled:
            self.conclude(pairing, step, outcome)
        late, self._request = pairing is self._request, None if settled else pairing
        announce(endpoint, publication, step)
        if late and settled:
            # The answer took longer than a moment: ask ahead, so that there is one at the next step.
            self._candidates = self._draw()
            if self._candidates and not endpoint.is_local(self._candidates[0]):
                self._request = endpoint.begin_exchange(self._draw())

    def _draw(self) -> list[int]:
        """Candidates for one exchange, in the order in which they are tried."""
        if self._candidates:
            drawn, self._candidates = self._candidates, []
            return drawn
        neighbours = self._endpoint.neighbours()
        return self._rng.sample(neighbours, min(self._settings.max_attempts, len(neighbours)))

    def conclude(self, pairing: ExchangeRequest, step: int, outcome: ExchangeOutcome) -> None:
        """Send the partner's delta, or record that no partner was found."""
        endpoint = self._endpoint
        if pairing.partner_model is None or pairing.partner_delta is None:
            endpoint.counters.skipped += 1
            self._record(ExchangeRecord(step, -1, SKIPPED, -1, 0.0, 0, pairing.failed_attempts))
            return
        header = pairing.partner_model.header  # not after `complete`, which gives the slot back
        now = endpoint.time_ns()
        pairing.partner_delta.stamp(rank=endpoint.rank, step=step, time_ns=now)
        endpoint.commit_exchange(pairing)
        nbytes = header.nbytes + pairing.partner_delta.layout.nbytes
        age = (now - header.time_ns) * 1e-9
        self._record(
            ExchangeRecord(
                step,
                header.rank,
                INITIATED,
                header.step,
                age,
                nbytes,
                pairing.failed_attempts,
                *outcome,
            )
        )

    def absorb(self, y: np.ndarray, step: int, *, publish: bool = False) -> int:
        """Apply the deltas that have arrived, if any, and publish the result if wanted.

        Returns:
            How many there were.
        """
        arrivals = self._endpoint.inbox.receive()
        if arrivals:
            messages = [arrival.message for arrival in arrivals]
            publication = self._endpoint.publication.reserve() if publish else None
            buffers = ExchangeBuffers(
                deltas=messages, weight=self._settings.mixing_weight, publication=publication
            )
            self._codec.average_pair(y, buffers)
            self._free(arrivals, step)
            announce(self._endpoint, publication, step)
        return len(arrivals)

    def _free(self, arrivals: list[ReceivedMessage], step: int) -> None:
        """Give the slots of absorbed deltas back."""
        for arrival in arrivals:
            header = arrival.message.header
            self._endpoint.inbox.free(arrival)
            age = (self._endpoint.time_ns() - header.time_ns) * 1e-9
            self._record(ExchangeRecord(step, arrival.sender, ABSORBED, header.step, age, 0, 0))

    def publish(self, y: np.ndarray, step: int) -> bool:
        """Publish a vector outside of an exchange; return whether there was a slot."""
        publication = self._endpoint.publication.reserve()
        if publication is not None:
            self._codec.encode(y, publication)
            announce(self._endpoint, publication, step)
        return publication is not None

    def finalize(self) -> Iterator[Request]:
        """Give back what an exchange under way holds of a partner."""
        if self._request is not None:
            while not self._request.is_settled:
                yield self._request
            self._endpoint.abort_exchange(self._request)
            self._request = None
