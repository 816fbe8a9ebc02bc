"""Push-sum: averages over directed edges, by mass that is split and sent (Kempe, Dobra, Gehrke; FOCS 2003).

Each rank has a numerator X_i and a weight w_i, first x_i and 1. A message takes a share of both along; the
receiver adds what it gets. Sums over all ranks and messages never change, and z_i = X_i / w_i goes to the
mean of the x_i, whatever the order and delay of the messages. Nobody needs to know who sends to it.

Here a rank holds z_i, the model at which gradients are taken, and w_i; X_i = w_i z_i is never formed:

* send:     w_i <- w_i - m, message (z_i, m): the part m z_i of the numerator; m = p w_i, p the share
* receive:  w_i <- w_i + m, z_i <- z_i + (m / w_i) (z_j - z_i): both numerators over both weights
* local:    X_i <- X_i - eta g is z_i <- z_i - (eta / w_i) g: the optimizer, its rate divided by w_i

Weights are integers, in quanta of 2^-40: the sum of all of them, messages included, is n exactly, always.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mpi_dasgd.algorithms.base import INITIATED, Algorithm, ExchangeRecord, LocalOptimizer
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.codecs import ExchangeBuffers, Message
from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.errors import UserError
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request, SendBuffer

__all__ = ["MIN_WEIGHT", "UNIT_WEIGHT", "PushSum", "rotation"]

UNIT_WEIGHT = 1 << 40
"""Quanta in a weight of 1."""

MIN_WEIGHT = UNIT_WEIGHT // 2
"""A rank with less than this keeps all it has, so that no weight falls below half of it."""


def rotation(graph: str, ranks: int) -> Sequence[int] | None:
    """Return by how much the out-neighbour lies ahead, exchange by exchange, again and again.

    In one exchange each rank sends to one rank and receives from one. None: `graph` has no such order.
    """
    return {
        "exponential": [1 << m for m in range((ranks - 1).bit_length())],
        "complete": range(1, ranks),
        "ring": range(1, 2),
    }.get(graph)


class PushSum(Algorithm):
    """What the algorithms on push-sum share.

    An exchange is recorded once, as initiated, by its receiver: the average is made there, and only there is
    its staleness known.
    """

    description = Description(
        exchanges="models with push-sum weights, sent one way",
        traffic="M / H",
    )
    capabilities = Capabilities(uses_publication=False, minimum_ranks=2)

    weight_quanta: int
    """Own weight, in quanta."""

    @classmethod
    def trailer_words(cls, ranks: int) -> int:
        """One word: the weight that a message carries, in quanta."""
        return 1

    @classmethod
    def max_steps_ahead(cls, settings: Settings, graph: Topology) -> int:
        """As many exchanges as it takes until every rank has waited for rank 0, by way of others or not."""
        offsets = rotation(graph.name, graph.size) or ()
        hops = max(len(offsets), graph.size - 1 if graph.name == "ring" else 0)
        each = 1 + -(
            -(settings.overlap_tau or 0) // settings.local_steps
        )  # exchanges that one may be ahead
        return hops * each * settings.local_steps

    @classmethod
    def _check_rotation(cls, settings: Settings, graph: Topology) -> None:
        if rotation(graph.name, graph.size) is None:
            raise UserError(
                f"topology.graph: {cls.name!r} sends along a directed rotation, in which each rank hears "
                f"from one rank at a time; {graph.name!r} has none: use 'exponential' (mixes in log2 n "
                "exchanges), 'complete' or 'ring'"
            )

    def start(self) -> None:
        """Begin with weight 1."""
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin anew with weight 1, whatever was on its way when the checkpoint was taken.

        The sum of the weights is n again, and the mean of the models that of the checkpoint.
        """
        self.weight_quanta = UNIT_WEIGHT
        self._send_buffer: SendBuffer | None = None

    @property
    def mass_weight(self) -> float:
        """The push-sum weight w_i."""
        return self.weight_quanta / UNIT_WEIGHT

    def mass(self) -> np.ndarray:
        """Return the numerator X_i = w_i z_i."""
        return self.x * self.mass_weight

    def mass_of(self, message: Message) -> np.ndarray:
        """Return the numerator that a message carries."""
        return message.payload * (int(message.trailer[0]) / UNIT_WEIGHT)

    def _update(self, local: LocalOptimizer) -> None:
        """X_i <- X_i - eta g(z_i)."""
        local.apply(UNIT_WEIGHT / self.weight_quanta)

    def _out_neighbour(self, step: int) -> int:
        """Return to whom the exchange of `step` sends."""
        endpoint = self.endpoint
        offsets = rotation(endpoint.topology.name, endpoint.size)
        assert offsets is not None, "refused by check"
        exchange = step // self.settings.local_steps - 1
        return (endpoint.rank + offsets[exchange % len(offsets)]) % endpoint.size

    def _send(self, posting: SendBuffer, step: int) -> None:
        """Send half of the own mass, or a message without mass if there is too little of it."""
        share = self.weight_quanta // 2 if self.weight_quanta >= MIN_WEIGHT else 0
        self.weight_quanta -= share
        message = posting.message
        self.codec.encode(self.x, message)
        message.trailer[0] = share
        message.stamp(rank=self.endpoint.rank, step=step, time_ns=self.endpoint.time_ns())
        self.endpoint.send(posting)

    def _wait_and_send(self, rank: int, step: int) -> Iterator[Request]:
        """Send to `rank`, waiting until its inbox has room."""

        def room() -> bool:
            self._send_buffer = self._send_buffer or self.endpoint.acquire_send_buffer(rank)
            return self._send_buffer is not None

        yield from self._until(room, rank)
        assert self._send_buffer is not None
        posting, self._send_buffer = self._send_buffer, None
        self._send(posting, step)

    def _until(self, condition: Callable[[], bool], *ranks: int) -> Iterator[Request]:
        """Wait for `condition`, which depends on words of `ranks`, and take in what arrives meanwhile."""
        endpoint = self.endpoint
        something = endpoint.wait_until(
            lambda: condition() or (self._accepts_messages and endpoint.inbox.has_messages),
            (endpoint.rank, *ranks),
        )
        while not condition():
            while not something.test():
                yield something
            if self._accepts_messages:
                self._receive()

    @property
    def _accepts_messages(self) -> bool:
        """Whether what arrives is taken in while it waits."""
        return True

    @abstractmethod
    def _receive(self) -> None:
        """Take in what has arrived, and free its slots."""

    def _accumulate(self, message: Message, step: int) -> None:
        """Add the mass of a message to the own one."""
        share = int(message.trailer[0])
        self.weight_quanta += share
        self.codec.average_pair(
            self.x, ExchangeBuffers(partner_model=message, weight=share / self.weight_quanta)
        )
        header = message.header
        age = (self.endpoint.time_ns() - header.time_ns) * 1e-9
        self.record(
            ExchangeRecord(step, header.rank, INITIATED, header.step, age, header.nbytes, 0)
        )
