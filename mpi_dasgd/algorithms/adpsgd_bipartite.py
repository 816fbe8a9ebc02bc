"""AD-PSGD as published (Lian et al., ICML 2018, arXiv 1710.06952, appendix): active and passive ranks.

The ranks are split into two sets so that all edges are between them. Communication of a rank:

active:  choose a neighbour j uniformly (all are passive); send x_i; wait for the answer;
         x_i <- (x_i + x_j)/2
passive: if some active i has asked: x_j <- (x_i + x_j)/2, and answer; else do not wait

Only active ranks wait, and only for passive ones, which never wait: no circle, no deadlock. On a graph that
is not bipartite three ranks can wait for each other in a circle. What computes is as in Algorithm 1: the
gradient is begun at a copy of the model before the average, and applied to the average.

How it is done here, and why:

- A request is a message in the inbox of j, x_i in the codec. The answer is the delta by which x_i must move;
  j moves by as much the other way. So both end at the same mean (to the rounding of the codec), and their
  sum is conserved with any codec, although only one coded model has crossed the wire.
- The model of an active rank does not change between request and answer. It asks at the end of a step and
  waits at the end of the next, so that the exchange runs while it computes (`algorithm.order` = adapt_with_combine).
  With order = adapt_then_combine it applies the gradient first, asks, and waits at once.
- The paper's passive ranks answer from a thread of their own, at any time; here a passive rank answers
  between two gradients. An active rank may thus wait for one gradient of its partner: a straggler on the
  passive side holds up who draws it.
- A passive rank that dies is given up. A full inbox counts as busy: another neighbour is tried, `max_attempts` in
  all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mpi_dasgd.algorithms.base import (
    ABSORBED,
    INITIATED,
    SKIPPED,
    Algorithm,
    ExchangeRecord,
    LocalOptimizer,
)
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.pair_averaging import PAIR_CODECS
from mpi_dasgd.codecs import ExchangeBuffers, Message
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.errors import UserError
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request
from mpi_dasgd.transport.inbox import ReceivedMessage

__all__ = ["BipartiteADPSGD"]


class BipartiteADPSGD(Algorithm):
    """Pair averaging in which active ranks wait for passive ones."""

    name = "adpsgd"
    variant = "bipartite"
    description = Description(
        paper="Lian et al. 2018, arXiv 1710.06952",
        exchanges="models, in pairs of an active and a passive rank",
        traffic="M / H",
        memory="4 M",
        waits="active ranks, for a gradient of a passive one",
    )
    capabilities = Capabilities(
        uses_publication=False,
        minimum_ranks=2,
    )
    config_keys = ("order", "local_steps", "max_attempts", "mixing_weight")
    codecs = PAIR_CODECS

    @classmethod
    def validate_requirements(cls, ranks: int, settings: Settings, graph: Topology) -> None:
        """Refuse graphs with odd circles.

        Raises:
            UserError: says why, and what would do.
        """
        super().validate_requirements(ranks, settings, graph)
        if not graph.is_bipartite:
            raise UserError(
                "algorithm.variant: 'bipartite' needs a graph of two sets with all edges between them, "
                f"or ranks could wait for each other in a circle; {graph.name} of {ranks} ranks has an "
                "odd circle: take topology.graph=ring with an even number of ranks, "
                "bipartite_exponential or hypercube, or algorithm.variant=pair, which waits for nobody"
            )

    def start(self) -> None:
        """Find out which side this rank is on: that of rank 0 is passive."""
        colours = self.endpoint.topology.bipartition
        assert colours is not None, "seen by check"
        self.active = bool(colours[self.endpoint.rank])
        self._awaiting_reply_from: int | None = None  # active: who owes an answer
        self._requests: list[ReceivedMessage] = []  # passive: not answered yet
        self._step = 0

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """One gradient; an active rank asks after every `local_steps` of them."""
        self._step = local.local_step
        if self.settings.order == "adapt_then_combine":
            local.apply()
            if not self.active:
                self._answer(local.local_step)
            elif self._due(local.local_step):
                self._send_request(local.local_step)
            yield from self._wait_for_reply(local.local_step)
        else:
            yield from self._wait_for_reply(local.local_step)
            if not self.active:
                self._answer(local.local_step)
            local.apply()
            if self.active and self._due(local.local_step):
                self._send_request(local.local_step)

    def _due(self, step: int) -> bool:
        return step % self.settings.local_steps == 0

    def _send_request(self, step: int) -> None:
        """Active: send x_i to a neighbour j, uniform among those with room in their inbox."""
        endpoint = self.endpoint
        neighbours = endpoint.neighbours()
        tries = min(self.settings.max_attempts, len(neighbours))
        for rank in self.rng.sample(neighbours, tries):
            posting = endpoint.acquire_send_buffer(rank)
            if posting is not None:
                self.codec.encode(self.x, posting.message)
                posting.message.stamp(rank=endpoint.rank, step=step, time_ns=endpoint.time_ns())
                endpoint.send(posting)
                self._awaiting_reply_from = rank
                return
        endpoint.counters.skipped += 1
        self.record(ExchangeRecord(step, -1, SKIPPED, -1, 0.0, 0, tries))

    def _wait_for_reply(self, step: int) -> Iterator[Request]:
        """Active: wait for the answer, if one is owed: x_i <- x_i + (x_j - x_i)/2."""
        inbox = self.endpoint.inbox
        answer = self.endpoint.wait_until(lambda: inbox.has_messages or self._partner_is_dead)
        while self._awaiting_reply_from is not None:
            while not answer.test():
                yield answer
            if not self._apply_replies(step) and self._partner_is_dead:
                self._awaiting_reply_from = None  # j has died

    @property
    def _partner_is_dead(self) -> bool:
        return self._awaiting_reply_from not in self.endpoint.neighbours()

    def _apply_replies(self, step: int) -> int:
        """Active: apply the answers that are here; return how many there were."""
        arrivals = self.endpoint.inbox.receive()
        for arrival in arrivals:
            message = arrival.message
            header = message.header
            self.codec.average_pair(
                self.x, ExchangeBuffers(deltas=(message,), weight=self.settings.mixing_weight)
            )
            self.endpoint.inbox.free(arrival)
            if arrival.sender == self._awaiting_reply_from:  # else of one that was taken for dead
                self._awaiting_reply_from = None
            age = (self.endpoint.time_ns() - header.time_ns) * 1e-9
            nbytes = 2 * header.nbytes  # request and answer
            self.record(
                ExchangeRecord(step, arrival.sender, INITIATED, header.step, age, nbytes, 0)
            )
        return len(arrivals)

    def _answer(self, step: int) -> None:
        """Passive: x_j <- x_j + d, d = w (x_i - x_j), and send -d, for every i that has asked."""
        endpoint = self.endpoint
        requests = [*self._requests, *endpoint.inbox.receive()]
        self._requests = []
        for request in requests:
            header = request.message.header
            outcome = None
            if request.sender in endpoint.neighbours():  # else it has died
                posting = endpoint.acquire_send_buffer(request.sender)
                if posting is None:
                    self._requests.append(request)  # no way to answer now: when called again
                    continue
                outcome = self.codec.average_pair(
                    self.x,
                    ExchangeBuffers(
                        partner_model=request.message,
                        weight=self.settings.mixing_weight,
                        reply_delta=posting.message,
                    ),
                )
                posting.message.stamp(rank=endpoint.rank, step=step, time_ns=endpoint.time_ns())
                endpoint.send(posting)
            endpoint.inbox.free(request)
            if outcome is not None:
                age = (endpoint.time_ns() - header.time_ns) * 1e-9
                self.record(
                    ExchangeRecord(step, request.sender, ABSORBED, header.step, age, 0, 0, *outcome)
                )

    def absorb(self, step: int) -> None:
        """Answer, or take the answer, outside of a step."""
        if self.active:
            self._apply_replies(step)
        else:
            self._answer(step)

    @property
    def is_drained(self) -> bool:
        """Whether nobody owes an answer, here or there."""
        return (
            self._awaiting_reply_from is None and not self._requests and self.endpoint.is_flushed()
        )

    def finalize(self) -> Iterator[Request]:
        """Active: wait for the last answer."""
        return self._wait_for_reply(self._step)

    def mass_of(self, message: Message) -> np.ndarray:
        """A request is a copy; an answer is what is still missing in x_i."""
        return self.codec.delta(message) if self.active else np.zeros_like(self.x)
