"""Push-sum: averages over directed edges, by mass that is split and sent.

Kempe, Dobra, Gehrke; FOCS 2003. Each rank has a numerator X_i and a weight w_i, first x_i and 1. A
message carries a share of both; the receiver adds what it receives. Sums over all ranks and
messages never change, and z_i = X_i / w_i converges to the mean of the x_i, whatever the order and
delay of the messages. No rank needs to know who sends to it.

Here a rank holds z_i, the model at which gradients are taken, and w_i; X_i = w_i z_i is never
formed:

* send:     w_i <- w_i - m, message (z_i, m): the part m z_i of the numerator; m = p w_i, share p
* receive:  w_i <- w_i + m, z_i <- z_i + (m / w_i) (z_j - z_i): both numerators over both weights
* local:    X_i <- X_i - eta g is z_i <- z_i - (eta / w_i) g: the optimizer, its rate divided by w_i

Weights are integers, in quanta of 2^-40: the sum of all of them, messages included, is always
exactly n.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mpi_dasgd.algorithms.base import Algorithm, LocalOptimizer
from mpi_dasgd.algorithms.communication import send, wait
from mpi_dasgd.algorithms.description import Capabilities, Description
from mpi_dasgd.algorithms.records import INITIATED
from mpi_dasgd.codecs import ExchangeBuffers, Message
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.topology import Topology
from mpi_dasgd.transport.endpoint import Request, SendBuffer

__all__ = ["MIN_WEIGHT", "UNIT_WEIGHT", "PushSum", "rotation"]

UNIT_WEIGHT = 1 << 40
"""Quanta in a weight of 1."""

MIN_WEIGHT = UNIT_WEIGHT // 2
"""A rank with less than this sends no mass, so that no weight falls below half of it."""


def rotation(graph: str, ranks: int) -> Sequence[int] | None:
    """Return the offsets from a rank to its out-neighbour, exchange by exchange, cyclically.

    In one exchange each rank sends to one rank and receives from one. None: `graph` has no such
    rotation.
    """
    return {
        "exponential": [1 << m for m in range((ranks - 1).bit_length())],
        "complete": range(1, ranks),
        "ring": range(1, 2),
    }.get(graph)


class PushSum(Algorithm):
    """Base of the algorithms on push-sum.

    An exchange is recorded once, as initiated, by its receiver: the average is made there, and only
    there is its staleness known.
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
        """Return 1: the weight that a message carries, in quanta."""
        return 1

    @classmethod
    def max_steps_ahead(cls, settings: AlgorithmConfig, graph: Topology) -> int:
        """Return the exchanges until all ranks have waited for rank 0, if only by way of others."""
        offsets = rotation(graph.name, graph.size) or ()
        hops = max(len(offsets), graph.size - 1 if graph.name == "ring" else 0)
        overlap = settings.overlap_tau or 0
        exchanges_per_hop = 1 + -(-overlap // settings.local_steps)  # that a rank can be ahead
        return hops * exchanges_per_hop * settings.local_steps

    @classmethod
    def _check_rotation(cls, settings: AlgorithmConfig, graph: Topology) -> None:
        if rotation(graph.name, graph.size) is None:
            raise UserError(
                f"topology.graph: {cls.name!r} sends along a directed rotation, in which each "
                f"rank hears from one rank at a time; {graph.name!r} has none: use 'exponential' "
                "(mixes in log2 n exchanges), 'complete' or 'ring'"
            )

    def start(self) -> None:
        """Begin with weight 1."""
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin with weight 1, whatever was in flight when the checkpoint was taken.

        The sum of the weights is n again, and the mean of the models that of the checkpoint.
        """
        self.weight_quanta = UNIT_WEIGHT
        self._send_buffer: SendBuffer | None = None

    def resume(self, step: int) -> None:
        """Go on with the own weight: what the user has written moves the numerator by w_i."""

    @property
    def model_weight(self) -> float:
        """The push-sum weight w_i: the mean of the models is sum_i X_i / n."""
        return self.mass_weight

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
        """Return the receiver of the exchange of `step`."""
        endpoint = self.endpoint
        offsets = rotation(endpoint.topology.name, endpoint.size)
        assert offsets is not None, "`_check_rotation` refuses such graphs"
        exchange = step // self.settings.local_steps - 1
        return (endpoint.rank + offsets[exchange % len(offsets)]) % endpoint.size

    def _send(self, send_buffer: SendBuffer, step: int) -> None:
        """Send half of the own mass, or a message without mass if the own weight is too small."""
        share = self.weight_quanta // 2 if self.weight_quanta >= MIN_WEIGHT else 0
        self.weight_quanta -= share
        message = send_buffer.message
        self.codec.encode(self.x, message)
        message.trailer[0] = share
        send(self.endpoint, send_buffer, step)

    def _wait_and_send(self, rank: int, step: int) -> Iterator[Request]:
        """Send to `rank`, waiting until its inbox has a free slot."""

        def is_acquired() -> bool:
            self._send_buffer = self._send_buffer or self.endpoint.acquire_send_buffer(rank)
            return self._send_buffer is not None

        yield from self._wait_until(is_acquired, rank)
        assert self._send_buffer is not None
        send_buffer, self._send_buffer = self._send_buffer, None
        self._send(send_buffer, step)

    def _wait_until(self, condition: Callable[[], bool], *ranks: int) -> Iterator[Request]:
        """Wait for `condition`, on control words of `ranks`, and process messages meanwhile."""
        endpoint = self.endpoint
        request = endpoint.wait_until(
            lambda: condition() or (self._accepts_messages and endpoint.inbox.has_messages),
            (endpoint.rank, *ranks),
        )
        while not condition():
            yield from wait(request)
            if self._accepts_messages:
                self._receive()

    @property
    def _accepts_messages(self) -> bool:
        """Whether messages are processed while the rank waits."""
        return True

    @abstractmethod
    def _receive(self) -> None:
        """Process the received messages, and free their slots."""

    def _accumulate(self, message: Message, step: int) -> None:
        """Add the mass of a message to the own mass."""
        share = int(message.trailer[0])
        self.weight_quanta += share
        buffers = ExchangeBuffers(partner_model=message, weight=share / self.weight_quanta)
        self.codec.average_pair(self.x, buffers)
        header = message.header
        self.records.message(INITIATED, step, header, nbytes=header.nbytes)
