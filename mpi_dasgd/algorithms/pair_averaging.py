"""Pair averaging: the average with a neighbour's publication that changes both sides alike.

1. absorb:   y_i <- y_i + sum of the deltas in the inbox
2. claim:    the publication ŷ_j of a neighbour j, and a slot of j's inbox; if either is taken, try
             another neighbour, at most `max_attempts` in all, then skip this exchange
3. average:  d = w (ŷ_j - y_i);  y_i <- y_i + d;  send -d to j
4. publish:  y_i, last

No rank waits: a claim that the network has not answered yet is used at the next exchange. Both
sides move by the same amounts, so that the sum of all vectors and of the deltas in flight is
conserved. A publication serves *one* exchange. Otherwise the fast ranks would all correct towards
the same stale model of a straggler, their deltas would add up, and the run would diverge
(`tests/simulation/test_simulator.py` shows it).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm
from mpi_dasgd.algorithms.communication import publish, wait
from mpi_dasgd.algorithms.neighbour_exchange import NeighbourExchange
from mpi_dasgd.algorithms.records import ABSORBED, INITIATED
from mpi_dasgd.codecs import ExchangeBuffers, Outcome
from mpi_dasgd.kernels.optimizer import OptimizerStep
from mpi_dasgd.transport.endpoint import ExchangeRequest, Request
from mpi_dasgd.transport.inbox import ReceivedMessage

__all__ = ["PairExchange"]


class PairExchange(NeighbourExchange):
    """One rank's pair averages. It never waits."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        self._request: ExchangeRequest | None = None  # started, and not settled when last tested
        self._candidates: list[int] = []  # candidates of the next exchange, if drawn already
        # Does what the lines below do, in one call.
        self._native = algorithm.endpoint.native_exchange(
            algorithm.codec, algorithm.settings.mixing_weight, lambda: self._records.ring
        )

    def exchange(
        self,
        y: np.ndarray,
        step: int,
        *,
        publish_result: bool,
        update: OptimizerStep | None = None,
    ) -> None:
        """Absorb, average, and publish if wanted, in one pass over memory.

        Args:
            y: own vector, shape (elements,), contiguous; changed in place.
            step: own local step, for the record.
            publish_result: whether to publish `y`; otherwise the caller does so, when it has
                changed `y` further.
            update: step of the local optimizer on `y`, to be made first, in the same pass.

        Raises:
            Diverged: `y` is not finite after `update`; no other rank has seen it.
        """
        if self._native is not None:
            try:
                self._native.exchange(
                    y, step, self._draw(), publish_result=publish_result, update=update
                )
            finally:
                self._records.deliver()
            return
        endpoint = self._endpoint
        endpoint.catch_up()
        received = endpoint.inbox.receive()  # 1
        request = self._request or endpoint.begin_exchange(self._draw())  # 2
        slot = endpoint.publication.reserve() if publish_result else None
        settled = request.is_settled  # read once: the progress thread may settle it at any moment
        outcome = self._codec.average_pair(  # 1, 3 and 4 in one pass
            y,
            ExchangeBuffers(
                deltas=[delta.message for delta in received],
                partner_model=request.partner_model if settled else None,
                weight=self._settings.mixing_weight,
                reply_delta=request.partner_delta if settled else None,
                publication=slot,
                update=update,
            ),
        )
        if update is not None:
            self._complete(update, request, settled, received, step)
        self._free(received, step)
        if settled:
            self.commit(request, step, outcome)
        was_late, self._request = request is self._request, None if settled else request
        publish(endpoint, slot, step)
        if was_late and settled:
            # The claim took longer than a step: claim ahead, so that one is ready at the next.
            self._candidates = self._draw()
            if self._candidates and not endpoint.is_local(self._candidates[0]):
                self._request = endpoint.begin_exchange(self._draw())

    def publish(self, y: np.ndarray, step: int, update: OptimizerStep | None = None) -> bool:
        """Publish a vector outside of an average; see `NeighbourExchange.publish`."""
        if self._native is not None:
            return self._native.publish(y, step, update)
        return super().publish(y, step, update)

    def _complete(
        self,
        update: OptimizerStep,
        request: ExchangeRequest,
        settled: bool,
        received: list[ReceivedMessage],
        step: int,
    ) -> None:
        """Give away nothing that a diverged model has made; it has absorbed what was received."""
        try:
            update.on_made()
        except BaseException:
            if settled:
                self._endpoint.abort_exchange(request)
            self._request = None if settled else request
            self._free(received, step)
            raise

    def _draw(self) -> list[int]:
        """Return the candidates for one exchange, in the order in which they are tried."""
        if self._candidates:
            drawn, self._candidates = self._candidates, []
            return drawn
        neighbours = self._endpoint.neighbours()
        return self._rng.sample(neighbours, min(self._settings.max_attempts, len(neighbours)))

    def commit(self, request: ExchangeRequest, step: int, outcome: Outcome) -> None:
        """Send the partner's delta, or record that no partner was found."""
        endpoint = self._endpoint
        if request.partner_model is None or request.partner_delta is None:
            self._records.skipped(step, request.failed_attempts)
            return
        # The header is read before the commit, which releases the publication's slot.
        header, now = request.partner_model.header, endpoint.time_ns()
        request.partner_delta.stamp(rank=endpoint.rank, step=step, time_ns=now)
        endpoint.commit_exchange(request)
        self._records.message(
            INITIATED,
            step,
            header,
            nbytes=header.nbytes + request.partner_delta.layout.nbytes,
            failed_attempts=request.failed_attempts,
            outcome=outcome,
            now_ns=now,
        )

    def absorb(self, y: np.ndarray, step: int, *, publish_result: bool = False) -> int:
        """Apply the received deltas, if any, and publish the result if wanted.

        Returns:
            Number of deltas.
        """
        if self._native is not None:
            count = self._native.absorb(y, step, publish_result=publish_result)
            self._records.deliver()
            return count
        received = self._endpoint.inbox.receive()
        if received:
            slot = self._endpoint.publication.reserve() if publish_result else None
            buffers = ExchangeBuffers(
                deltas=[delta.message for delta in received],
                weight=self._settings.mixing_weight,
                publication=slot,
            )
            self._codec.average_pair(y, buffers)
            self._free(received, step)
            publish(self._endpoint, slot, step)
        return len(received)

    def _free(self, received: list[ReceivedMessage], step: int) -> None:
        """Free the inbox slots of absorbed deltas, and record them."""
        for delta in received:
            header = delta.message.header
            self._endpoint.inbox.free(delta)
            self._records.message(ABSORBED, step, header)

    def finalize(self) -> Iterator[Request]:
        """Release what an unfinished exchange holds of a partner."""
        if self._request is not None:
            yield from wait(self._request)
            self._endpoint.abort_exchange(self._request)
            self._request = None
