"""SwarmSGD, blocking: both sides end their phases first.

Nadiradze et al., NeurIPS 2021, arXiv 1910.12308.

On the interaction of i and j, an edge drawn uniformly:

1. local:   H_i times x_i <- x_i - eta g(x_i), and H_j times x_j <- x_j - eta g(x_j)
2. average: x_i, x_j <- (x_i + x_j)/2

The paper says who meets whom, not how they find each other. Here a rank at the end of its phase
meets a neighbour, tried in random order, that has also ended its phase, and otherwise waits for
one. So the edge is not drawn before the phases but uniformly among the waiting ranks; a rank never
waits for one that still computes although another neighbour is free. The meeting:

a. offer:    publish x_i; the publication is READY only while i waits
b. claim:    try to claim the offer of each neighbour in random order
c. withdraw: having claimed j's, withdraw the own offer by claiming it; then average, send j its
             delta: done
d. lost:     the own offer is claimed already by some k: release j's, as if it had not been claimed,
             and wait for k. But where k is j (both have claimed each other) the lower of the two
             goes on with c, and where k has released it meanwhile the own offer is void: go on
             with c
e. wait:     until the delta of the rank that claimed the offer is received: done; or the offer was
             released: go to a

There is no deadlock: of two neighbours that both wait, the later to offer has tried the earlier's
offer after publishing its own, and found it; a rank that holds a claim never waits for another one.
That several ranks all lose at once, in a cycle of claims, has a probability below 1 each time, as
they claim in random order.

A rank that has finished training claims offers as long as others train, and offers nothing itself:
so no rank waits forever for a partner if one is left over, with odd n, or when the last rank is
alone. Ranks do not wait for a neighbour that has died; what it had claimed is released. Each round
of claims costs one operation on a control word per neighbour: choose a sparse graph for hundreds of
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.algorithms.neighbour_exchange import PAIR_CODECS
from mpi_dasgd.algorithms.pair_averaging import PairExchange
from mpi_dasgd.codecs import ExchangeBuffers
from mpi_dasgd.transport.control_words import FREE, READY
from mpi_dasgd.transport.endpoint import ExchangeRequest, Request

__all__ = ["BlockingSwarm"]


class BlockingSwarm(Algorithm):
    """Local phases; at their ends two ranks meet and average."""

    name = "swarm"
    variant = "blocking"
    description = Description(
        paper="Nadiradze et al. 2021, arXiv 1910.12308",
        exchanges="models, in pairs that conserve the mean",
        traffic="M / H",
        memory="8 M",
        waits="at the end of a phase, for a neighbour at the end of its own",
    )
    capabilities = Capabilities(minimum_ranks=2)
    config_keys = ("local_steps", "local_steps_distribution", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Prepare; nothing is published before the end of the first phase."""
        self._pairs = PairExchange(self)
        self._phases = Phases(self.settings, self.rng)
        self._finished = False
        self._request: ExchangeRequest | None = None  # claim of `attend` that is not settled

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """Make one local step, and meet a neighbour at the end of a phase."""
        local.apply()
        if self._phases.ends(local.local_step):
            yield from self._meet(local.local_step)

    def _meet(self, step: int) -> Iterator[Request]:
        """Repeat steps a to e until an average is made; none is if all neighbours are gone."""
        publication = self.endpoint.publication
        while self._request is not None:
            yield from wait(self._request)
            self.attend(step)
        while self.endpoint.neighbours():
            # A partner releases its slot last.
            yield from self._wait_until(lambda: publication.has_free_slot)
            self._pairs.publish(self.x, step)
            request = yield from self._claim_an_offer()
            if request is not None:
                if self._withdraw(request):
                    self._average(request, step)
                    return
                self.endpoint.abort_exchange(request)
            if (yield from self._wait_for_delta(step)):
                return
        self.records.skipped(step)

    def _wait_until(self, condition: Callable[[], bool]) -> Iterator[Request]:
        """Wait for a condition on own control words."""
        return wait(self.endpoint.wait_until(condition))

    def _claim_an_offer(self) -> Generator[Request, None, ExchangeRequest | None]:
        """Step b: return a claimed offer; None if there is none, or the own offer is claimed."""
        neighbours = self.endpoint.neighbours()
        for rank in self.rng.sample(neighbours, len(neighbours)):
            if self.endpoint.publication.state[0] != READY:
                break
            request = self.endpoint.begin_exchange([rank])
            yield from wait(request)
            if request.partner_model is not None:
                return request
        return None

    def _withdraw(self, request: ExchangeRequest) -> bool:
        """Steps c and d: return whether to average with the rank whose offer was claimed."""
        publication, claim = self.endpoint.publication, request.claim
        assert claim is not None
        if publication.withdraw():
            return True
        state, holder = publication.state
        if state == FREE:  # released: either its delta was sent before, or the claim was given up
            return not self.endpoint.inbox.has_messages
        return holder == claim.rank and self.endpoint.rank < claim.rank

    def _average(self, request: ExchangeRequest, step: int) -> None:
        """Move both to their mean: x_i <- x_i + d, d = w (x_j - x_i); send -d to j."""
        buffers = ExchangeBuffers(
            partner_model=request.partner_model,
            weight=self.settings.mixing_weight,
            reply_delta=request.partner_delta,
        )
        outcome = self.codec.average_pair(self.x, buffers)
        self._pairs.commit(request, step, outcome)

    def _wait_for_delta(self, step: int) -> Generator[Request, None, bool]:
        """Step e: return whether a delta was received; otherwise the offer is void."""
        endpoint = self.endpoint
        while True:
            yield from self._wait_until(
                lambda: (
                    endpoint.inbox.has_messages
                    or endpoint.publication.state[0] == FREE
                    or not endpoint.neighbours()
                )
            )
            is_void = endpoint.publication.state[0] == FREE  # read before the inbox is
            if self._pairs.absorb(self.x, step):
                return True
            if is_void or (not endpoint.neighbours() and endpoint.publication.withdraw()):
                return False

    def absorb(self, step: int) -> None:
        """Average with a neighbour that waits, once training is finished."""
        if self._finished:
            self.attend(step)

    def attend(self, step: int) -> None:
        """Average with a neighbour that waits, if there is one."""
        if self._request is None:
            neighbours = self.endpoint.neighbours()
            candidates = self.rng.sample(neighbours, len(neighbours))
            self._request = self.endpoint.begin_exchange(candidates)
        if self._request.is_settled:
            if self._request.partner_model is not None:
                self._average(self._request, step)
            self._request = None

    @property
    def is_drained(self) -> bool:
        """Whether no rank waits for a delta of this one."""
        return self._request is None and self.endpoint.is_flushed()

    def reset(self, step: int) -> None:
        """Offer models again at the ends of phases."""
        self._finished = False

    def finalize(self) -> Iterator[Request]:
        """Go over to claiming the offers of those that still train."""
        self._finished = True
        return iter(())
