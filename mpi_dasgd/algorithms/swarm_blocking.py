"""SwarmSGD, blocking (Nadiradze et al., NeurIPS 2021, arXiv 1910.12308): both sides end their phases first.

On the interaction of i and j, an edge drawn uniformly:

1. local:   H_i times x_i <- x_i - eta g(x_i), and H_j times x_j <- x_j - eta g(x_j)
2. average: x_i, x_j <- (x_i + x_j)/2

The paper says who meets whom, not how they find each other. Here a rank at the end of its phase meets a
neighbour, in random order, that is there, too, and else waits for one. So the edge is not drawn before the
phases but uniformly among those who wait; a rank never waits for one that still computes although another
neighbour is free. The meeting:

a. offer:    publish x_i; the publication is READY only while i waits
b. look:     try to claim the offer of each neighbour in random order
c. withdraw: having claimed j's, take the own offer back by claiming it; then average, send j its delta: done
d. lost:     the own offer is claimed already by some k: give j's back, as if it had not been claimed, and
             wait for k. But where k is j (both have claimed each other) the lower of the two goes on with c,
             and where k has given it back meanwhile the own offer is void: go on with c
e. wait:     until the delta of the rank that claimed the offer is here: done; or it was given back: go to a

No deadlock: of two neighbours that both wait, the later to offer has looked at the earlier's offer after its
own was out, and found it; claims are never waited for while one is held. That all of several ranks lose at
once, in a circle of claims, has a probability below 1 each time, as they look in random order.

A rank that has finished training claims offers, as long as others train, and offers nothing itself: so
nobody waits for ever for a partner that is left over, with odd n, or when the last rank is alone. A
neighbour that has died is not waited for; what it had claimed is given back. Looking costs a word operation
for each neighbour: take a sparse graph for hundreds of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from mpi_dasgd.algorithms.base import SKIPPED, Algorithm, ExchangeRecord, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.algorithms.pair_averaging import PAIR_CODECS, PairExchange
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
    capabilities = Capabilities(
        minimum_ranks=2,
    )
    config_keys = ("local_steps", "local_steps_distribution", "mixing_weight")
    codecs = PAIR_CODECS

    def start(self) -> None:
        """Nothing is published before the end of the first phase."""
        self._pairs = PairExchange(self.endpoint, self.codec, self.settings, self.rng, self.record)
        self._phases = Phases(self.settings, self.rng)
        self._finished = False
        self._awaiting_reply_from: ExchangeRequest | None = (
            None  # finished: a look that has not been answered
        )

    def step(self, local: LocalOptimizer) -> Iterator[Request]:
        """One local step, and at the end of a phase a meeting."""
        local.apply()
        if self._phases.ends(local.local_step):
            yield from self._exchange_with_partner(local.local_step)

    def _exchange_with_partner(self, step: int) -> Iterator[Request]:
        """Steps a to e, until an average is made; none if all neighbours are gone."""
        publication = self.endpoint.publication
        while self.endpoint.neighbours():
            yield from self._wait(
                lambda: publication.has_free_slot
            )  # a partner gives its slot back last
            self._pairs.publish(self.x, step)
            pairing = yield from self._claim_an_offer()
            if pairing is not None:
                if self._withdraw(pairing):
                    self._average(pairing, step)
                    return
                self.endpoint.abort_exchange(pairing)
            if (yield from self._answered(step)):
                return
        self.endpoint.counters.skipped += 1
        self.record(ExchangeRecord(step, -1, SKIPPED, -1, 0.0, 0, 0))

    def _wait(self, condition: Callable[[], bool]) -> Iterator[Request]:
        """Wait for own control words."""
        pending = self.endpoint.wait_until(condition)
        while not pending.test():
            yield pending

    def _claim_an_offer(self) -> Generator[Request, None, ExchangeRequest | None]:
        """Step b: return the offer that was claimed, or None if there is none, or the own one is taken."""
        neighbours = self.endpoint.neighbours()
        for rank in self.rng.sample(neighbours, len(neighbours)):
            if self.endpoint.publication.state[0] != READY:
                break
            pairing = self.endpoint.begin_exchange([rank])
            while not pairing.is_settled:
                yield pairing
            if pairing.partner_model is not None:
                return pairing
        return None

    def _withdraw(self, pairing: ExchangeRequest) -> bool:
        """Steps c and d: return whether to average with the rank whose offer was claimed."""
        publication, claim = self.endpoint.publication, pairing.claim
        assert claim is not None
        if publication.withdraw():
            return True
        state, holder = publication.state
        if state == FREE:  # released: after its delta was sent, or given back
            return not self.endpoint.inbox.has_messages
        return holder == claim.rank and self.endpoint.rank < claim.rank

    def _average(self, pairing: ExchangeRequest, step: int) -> None:
        """Both move to their mean: x_i <- x_i + d, d = w (x_j - x_i); send -d to j."""
        outcome = self.codec.average_pair(
            self.x,
            ExchangeBuffers(
                partner_model=pairing.partner_model,
                weight=self.settings.mixing_weight,
                reply_delta=pairing.partner_delta,
            ),
        )
        self._pairs.conclude(pairing, step, outcome)

    def _answered(self, step: int) -> Generator[Request, None, bool]:
        """Step e: return whether a delta has come; else the offer is void."""
        endpoint = self.endpoint
        while True:
            yield from self._wait(
                lambda: (
                    endpoint.inbox.has_messages
                    or endpoint.publication.state[0] == FREE
                    or not endpoint.neighbours()
                )
            )
            void = endpoint.publication.state[0] == FREE  # seen before the delta is looked for
            if self._pairs.absorb(self.x, step):
                return True
            if void or (not endpoint.neighbours() and endpoint.publication.withdraw()):
                return False

    def absorb(self, step: int) -> None:
        """Finished: average with a neighbour that waits, if there is one. It does not wait itself."""
        if not self._finished:
            return
        if self._awaiting_reply_from is None:
            neighbours = self.endpoint.neighbours()
            self._awaiting_reply_from = self.endpoint.begin_exchange(
                self.rng.sample(neighbours, len(neighbours))
            )
        if self._awaiting_reply_from.is_settled:
            if self._awaiting_reply_from.partner_model is not None:
                self._average(self._awaiting_reply_from, step)
            self._awaiting_reply_from = None

    @property
    def is_drained(self) -> bool:
        """Whether this rank owes nobody a delta."""
        return self._awaiting_reply_from is None and self.endpoint.is_flushed()

    def finalize(self) -> Iterator[Request]:
        """From now on meet those who still train."""
        self._finished = True
        return iter(())
