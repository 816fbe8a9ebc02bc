"""AD-PSGD: asynchronous decentralized parallel SGD (Lian, Zhang, Zhang, Liu; ICML 2018; arXiv 1710.06952).

Each rank, whenever it has a gradient, averages its model with that of one neighbour drawn at random.
The average changes both sides by the same amount, so that it conserves the mean of all models, and
nobody waits:

1. local:    x_i <- x_i - eta g_i
2. absorb:   x_i <- x_i + sum of the deltas in the inbox
3. pair:     claim the publication of a neighbour j, and a slot of j's inbox; if either is taken try
             another neighbour, `tries` in all, else skip this exchange
4. average:  d = w (x̂_j - x_i);  x_i <- x_i + d;  send -d to j
5. publish:  x_i, last

A published model serves *one* exchange. Without that the fast ranks all correct towards the same stale
model of a straggler, their deltas add up, and the run diverges (a test shows it).

The paper averages before it applies the gradient. This order, with everything in one pass over memory
and the publication last, has the same effective step (1.00 to 1.01 on the noise-free quadratic) and a
third of the disagreement under noise.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpi_dasgd.algorithms.base import ABSORBED, INITIATED, SKIPPED, Algorithm, Exchange, Local
from mpi_dasgd.codecs import Message, Outcome
from mpi_dasgd.transport.endpoint import Pairing, Pending
from mpi_dasgd.transport.inbox import Arrival

__all__ = ["ADPSGD"]


class ADPSGD(Algorithm):
    """Lock-free pair averaging that conserves the mean."""

    name = "adpsgd"
    paper = "Lian et al. 2018"
    exchanges = "models, in pairs that conserve the mean"
    traffic = "2 M / H"
    memory = "8 M"
    waits = "never"
    codecs = ("lattice8", "none", "bf16", "fp16", "lattice4", "lattice16", "qsgd8")
    minimum_ranks = 2

    def start(self) -> None:
        """Publish the initial model."""
        self._pairing: Pairing | None = None  # asked for, and not settled when last seen
        self._drawn: list[int] = []  # candidates of the next exchange, if drawn already
        self.restart(0)

    def restart(self, step: int) -> None:
        """Publish a model that did not come out of a step."""
        publication = self.endpoint.publication.reserve()
        self.codec.exchange(self.x, (), None, self.settings.weight, None, publication)
        self._publish(publication, step)

    def step(self, local: Local) -> Iterator[Pending]:
        """One gradient, and after every `local_steps` of them one exchange."""
        local.update()
        if local.step % self.settings.local_steps == 0:
            self._exchange(local.step)
        return
        yield  # an asynchronous algorithm never does

    def _exchange(self, step: int) -> None:
        endpoint = self.endpoint
        arrivals = endpoint.inbox.receive()
        pairing = self._pairing or endpoint.pair(self._draw())
        publication = endpoint.publication.reserve()
        settled = pairing.settled  # once: the courier may settle it at any moment
        # All that moves the model happens in this one pass over memory.
        outcome = self.codec.exchange(
            self.x,
            [arrival.message for arrival in arrivals],
            pairing.theirs if settled else None,
            self.settings.weight,
            pairing.reply if settled else None,
            publication,
        )
        self._free(arrivals, step)
        if settled:
            self._conclude(pairing, step, outcome)
        late, self._pairing = pairing is self._pairing, None if settled else pairing
        self._publish(publication, step)
        if late and settled:
            # The answer took longer than a moment: ask ahead, so that there is one at the next step.
            self._drawn = self._draw()
            if self._drawn and not endpoint.immediate(self._drawn[0]):
                self._pairing = endpoint.pair(self._draw())

    def _draw(self) -> list[int]:
        """Candidates for one exchange, in the order in which they are tried."""
        if self._drawn:
            drawn, self._drawn = self._drawn, []
            return drawn
        neighbours = self.endpoint.neighbours()
        return self.rng.sample(neighbours, min(self.settings.tries, len(neighbours)))

    def _conclude(self, pairing: Pairing, step: int, outcome: Outcome) -> None:
        """Send the partner's delta, or record that none was found."""
        endpoint = self.endpoint
        if pairing.theirs is None or pairing.reply is None:
            endpoint.counters.skipped += 1
            self.record(Exchange(step, -1, SKIPPED, -1, 0.0, 0, pairing.failed))
            return
        header = pairing.theirs.header  # not after `complete`, which gives the slot back
        now = endpoint.time_ns()
        pairing.reply.stamp(rank=endpoint.rank, step=step, time_ns=now)
        endpoint.complete(pairing)
        nbytes = header.nbytes + pairing.reply.layout.nbytes
        age = (now - header.time_ns) * 1e-9
        self.record(
            Exchange(
                step, header.rank, INITIATED, header.step, age, nbytes, pairing.failed, *outcome
            )
        )

    def _free(self, arrivals: list[Arrival], step: int) -> None:
        """Give the slots of absorbed deltas back."""
        for arrival in arrivals:
            header = arrival.message.header
            self.endpoint.inbox.free(arrival)
            age = (self.endpoint.time_ns() - header.time_ns) * 1e-9
            self.record(Exchange(step, arrival.sender, ABSORBED, header.step, age, 0, 0))

    def _publish(self, publication: Message | None, step: int) -> None:
        if publication is not None:
            publication.stamp(rank=self.endpoint.rank, step=step, time_ns=self.endpoint.time_ns())
            self.endpoint.publication.publish()

    def absorb(self, step: int) -> None:
        """Apply the deltas that have arrived, outside of a step."""
        arrivals = self.endpoint.inbox.receive()
        messages = [arrival.message for arrival in arrivals]
        self.codec.exchange(self.x, messages, None, self.settings.weight, None, None)
        self._free(arrivals, step)

    def leave(self) -> Iterator[Pending]:
        """Give back what an exchange under way holds of a partner."""
        if self._pairing is not None:
            while not self._pairing.settled:
                yield self._pairing
            self.endpoint.abandon(self._pairing)
            self._pairing = None
