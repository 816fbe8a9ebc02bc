"""AD-PSGD as published (Lian et al., ICML 2018, arXiv 1710.06952, appendix): active, passive ranks.

The ranks are split into two sets so that all edges run between them. Communication of a rank:

active:  choose a neighbour j uniformly (all are passive); send x_i; wait for the answer;
         x_i <- (x_i + x_j)/2
passive: if some active i has sent a request: x_j <- (x_i + x_j)/2, and answer; else do not wait

Only active ranks wait, and only for passive ones, which never wait: there is no cycle of waiting
ranks, so no deadlock. On a graph that is not bipartite three ranks can wait for each other in a
cycle. Computation is as in Algorithm 1: the gradient is started at a copy of the model before the
average, and applied to the average.

How it is done here, and why:

- A request is a message in the inbox of j, x_i in the codec. The answer is the delta by which x_i
  must move; j moves by as much the other way. So both end at the same mean (to the rounding of the
  codec), and their sum is conserved with any codec, although only one encoded model has crossed the
  wire.
- The model of an active rank does not change between request and answer. It sends the request at
  the end of a step and waits at the end of the next, so that the exchange overlaps with the
  computation (`algorithm.order` = adapt_with_combine). With order = adapt_then_combine it applies
  the gradient first, sends the request, and waits at once.
- The paper's passive ranks answer from a thread of their own, at any time; here a passive rank
  answers between two gradients. An active rank may thus wait for one gradient of its partner: a
  straggler on the passive side delays every rank that draws it.
- An active rank stops waiting for a passive rank that dies. A full inbox counts as busy: another
  neighbour is tried, at most `max_attempts` in all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import send, wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.algorithms.records import ABSORBED, INITIATED
from mpi_dasgd.codecs import ExchangeBuffers, Message
from mpi_dasgd.config.schema import AlgorithmConfig
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
    capabilities = Capabilities(uses_publication=False, minimum_ranks=2)
    config_keys = ("order", "local_steps", "max_attempts", "mixing_weight")
    codecs = PAIR_CODECS

    @classmethod
    def validate_requirements(cls, ranks: int, settings: AlgorithmConfig, graph: Topology) -> None:
        """Refuse graphs with odd cycles.

        Raises:
            UserError: says why, and what would work.
        """
        super().validate_requirements(ranks, settings, graph)
        if not graph.is_bipartite:
            raise UserError(
                "algorithm.variant: 'bipartite' needs a graph of two sets with all edges between "
                f"them, or ranks could wait for each other in a circle; {graph.name} of {ranks} "
                "ranks has an odd circle: take topology.graph=ring with an even number of ranks, "
                "bipartite_exponential or hypercube, or algorithm.variant=pair, which "
                "never waits"
            )

    def start(self) -> None:
        """Determine the side of this rank; that of rank 0 is passive."""
        sides = self.endpoint.topology.bipartition
        assert sides is not None, "`validate_requirements` refuses such graphs"
        self.active = bool(sides[self.endpoint.rank])
        self._awaiting_reply_from: int | None = None  # active: rank that has not answered yet
        self._requests: list[ReceivedMessage] = []  # passive: not answered yet
        self._step = 0

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Apply one gradient; an active rank sends a request after `local_steps` gradients."""
        self._step = local.local_step
        if self.settings.order == "adapt_then_combine":
            local.apply()
            if not self.active:
                self._answer(local.local_step)
            elif self._is_due(local.local_step):
                self._send_request(local.local_step)
            yield from self._wait_for_reply(local.local_step)
        else:
            yield from self._wait_for_reply(local.local_step)
            if not self.active:
                self._answer(local.local_step)
            local.apply()
            if self.active and self._is_due(local.local_step):
                self._send_request(local.local_step)

    def _is_due(self, step: int) -> bool:
        return step % self.settings.local_steps == 0

    def _send_request(self, step: int) -> None:
        """Active: send x_i to a neighbour j, uniform among those whose inbox has a free slot."""
        endpoint = self.endpoint
        neighbours = endpoint.neighbours()
        attempts = min(self.settings.max_attempts, len(neighbours))
        for rank in self.rng.sample(neighbours, attempts):
            send_buffer = endpoint.acquire_send_buffer(rank)
            if send_buffer is not None:
                self.codec.encode(self.x, send_buffer.message)
                send(endpoint, send_buffer, step)
                self._awaiting_reply_from = rank
                return
        self.records.skipped(step, attempts)

    def _wait_for_reply(self, step: int) -> Iterator[Request]:
        """Active: wait for the answer to a request, if any: x_i <- x_i + (x_j - x_i)/2."""
        inbox = self.endpoint.inbox
        request = self.endpoint.wait_until(lambda: inbox.has_messages or self._partner_is_dead)
        while self._awaiting_reply_from is not None:
            yield from wait(request)
            if not self._apply_replies(step) and self._partner_is_dead:
                self._awaiting_reply_from = None

    @property
    def _partner_is_dead(self) -> bool:
        return self._awaiting_reply_from not in self.endpoint.neighbours()

    def _apply_replies(self, step: int) -> int:
        """Active: apply the received answers; return their number."""
        replies = self.endpoint.inbox.receive()
        for reply in replies:
            message, header = reply.message, reply.message.header
            buffers = ExchangeBuffers(deltas=(message,), weight=self.settings.mixing_weight)
            self.codec.average_pair(self.x, buffers)
            self.endpoint.inbox.free(reply)
            if reply.sender == self._awaiting_reply_from:  # else its sender was taken for dead
                self._awaiting_reply_from = None
            nbytes = 2 * header.nbytes  # request and answer
            self.records.message(INITIATED, step, header, nbytes=nbytes)
        return len(replies)

    def _answer(self, step: int) -> None:
        """Passive: for every request x_j <- x_j + d, d = w (x_i - x_j), and send -d to i."""
        endpoint = self.endpoint
        requests = [*self._requests, *endpoint.inbox.receive()]
        self._requests = []
        for request in requests:
            header = request.message.header
            outcome = None
            if request.sender in endpoint.neighbours():  # else it has died
                send_buffer = endpoint.acquire_send_buffer(request.sender)
                if send_buffer is None:
                    self._requests.append(request)  # its inbox is full: answer at the next call
                    continue
                buffers = ExchangeBuffers(
                    partner_model=request.message,
                    weight=self.settings.mixing_weight,
                    reply_delta=send_buffer.message,
                )
                outcome = self.codec.average_pair(self.x, buffers)
                send(endpoint, send_buffer, step)
            endpoint.inbox.free(request)
            if outcome is not None:
                self.records.message(ABSORBED, step, header, outcome=outcome)

    def absorb(self, step: int) -> None:
        """Answer requests, or apply an answer, outside of a step."""
        if self.active:
            self._apply_replies(step)
        else:
            self._answer(step)

    def attend(self, step: int) -> None:
        """Answer requests."""
        if not self.active:
            self._answer(step)

    @property
    def is_drained(self) -> bool:
        """Whether no answer is missing, neither to this rank nor from it."""
        return (
            self._awaiting_reply_from is None and not self._requests and self.endpoint.is_flushed()
        )

    def finalize(self) -> Iterator[Request]:
        """Active: wait for the last answer."""
        return self._wait_for_reply(self._step)

    def mass_of(self, message: Message) -> np.ndarray:
        """Return what an answer adds to x_i; a request is a copy, and adds nothing."""
        return self.codec.delta(message) if self.active else np.zeros_like(self.x)
