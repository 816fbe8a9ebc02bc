"""What algorithms need of a codec, and what a codec says of an exchange."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mpi_dasgd.codecs.message import Layout, Message

__all__ = ["Codec", "ExchangeOutcome", "Seeds"]


class ExchangeOutcome(NamedTuple):
    """What a codec found out in an exchange.

    Attributes:
        distance: ||x_i - x_j||_2 between the own model and the partner's publication, before they
            were averaged, without rejected buckets; NaN if the codec does not measure it.
        rejected: buckets of the publication that could not be decoded: neither side moved there.
    """

    distance: float = float("nan")
    rejected: int = 0


class Codec(Protocol):
    """Turns models and deltas into messages, and averages with them.

    One object belongs to one rank: it may keep state, which goes into checkpoints.

    Attributes:
        name: as in the configuration.
        layout: of all its messages; ``layout.nbytes`` is what one costs on the wire.
        counters: what was decoded so far, by name; empty if nothing can fail.
    """

    name: str
    layout: Layout
    counters: dict[str, int]

    def encode(self, x: np.ndarray, out: Message) -> None:
        """Write model `x`, 1-D, to `out`."""

    def average_pair(
        self,
        x: np.ndarray,
        deltas: Sequence[Message],
        partner_model: Message | None,
        weight: float,
        reply_delta: Message | None,
        publication: Message | None,
    ) -> ExchangeOutcome:
        """Absorb deltas, move towards `partner_model`, write the partner's delta and the own publication.

        Both sides move by exactly the same amounts, so that the sum of all models and deltas on
        their way is conserved.

        Args:
            x: own model, 1-D, contiguous; changed in place.
            deltas: deltas to absorb first, in this order.
            partner_model: the partner's publication, or None if there is no partner.
            weight: share of the distance to move, in (0, 1/2].
            reply_delta: receives the partner's delta, or None.
            publication: receives the new model, or None.
        """

    def delta(self, message: Message) -> np.ndarray:
        """Return a delta as numbers, shape (elements,): for meters and tests."""

    def state(self) -> dict[str, np.ndarray]:
        """Return what a checkpoint must hold, arrays by name."""

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back what `state` returned."""


class Seeds:
    """The seeds of a rank's messages: no two of a run are alike.

    Args:
        seed: of the run.
        rank: whose messages.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._start = random.Random(f"mpi_dasgd messages {seed} {rank}").getrandbits(64)
        self.drawn = 0

    def draw(self) -> int:
        """Return the next seed, unsigned 64 bits."""
        self.drawn += 1
        return (self._start + self.drawn) & 0xFFFFFFFFFFFFFFFF
