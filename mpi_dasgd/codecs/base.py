"""Base of all codecs, the buffers of an exchange, and the seeds of messages."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from mpi_dasgd.codecs.message import Layout, Message
from mpi_dasgd.codecs.native_state import PairCodecStruct, SeedsStruct
from mpi_dasgd.device.base import Array
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.optimizer import OptimizerStep

__all__ = ["Codec", "ExchangeBuffers", "ExchangeOutcome", "Outcome", "Seeds", "require_float32"]


@dataclass(slots=True)
class ExchangeBuffers:
    """Messages that one call of `Codec.average_pair` reads and writes.

    Attributes:
        deltas: received deltas to absorb first, in this order.
        partner_model: publication of the partner, or None if there is no partner.
        weight: share of the distance to the partner to move, in (0, 1/2].
        reply_delta: receives the partner's delta; None if nothing is sent back.
        publication: receives the new model; None if it is not published.
        update: step of the local optimizer, made before all else; None: there is none to make.
    """

    deltas: Sequence[Message] = ()
    partner_model: Message | None = None
    weight: float = 0.5
    reply_delta: Message | None = None
    publication: Message | None = None
    update: OptimizerStep | None = None


class ExchangeOutcome(NamedTuple):
    """What a codec measured in an exchange.

    Attributes:
        distance: ||x_i - x_j||_2 between the own model and the partner's publication before they
            were averaged, without rejected buckets; NaN if the codec does not measure it.
        rejected: buckets of the publication that could not be decoded; neither side moves there.
    """

    distance: float = float("nan")
    rejected: int = 0

    @property
    def is_ready(self) -> bool:
        """True; see `Outcome`."""
        return True

    def value(self) -> ExchangeOutcome:
        """Return itself; see `Outcome`."""
        return self


class Outcome(Protocol):
    """An `ExchangeOutcome` that may be late: that of a GPU's work, which is only asked for."""

    @property
    def is_ready(self) -> bool:
        """Whether it is known. Never waits.

        Raises:
            DeviceFailed: the device has failed, and it will never be known.
        """

    def value(self) -> ExchangeOutcome:
        """Return it; waits until it is known.

        Raises:
            DeviceFailed: the device has failed.
        """


class Codec(ABC):
    """Base of all codecs: encodes models and deltas as messages, and averages with them.

    An object belongs to one rank. It may keep state, which is saved in checkpoints.

    Attributes:
        name: value of `codec.name`.
        layout: layout of all its messages; ``layout.nbytes`` is what a message costs on the wire.
        counters: decoded and rejected buckets so far, by name; empty if decoding cannot fail. Those
            of an exchange whose outcome is late are counted when it is known; see `settle`.
    """

    name: str
    layout: Layout
    counters: MutableMapping[str, int]

    @abstractmethod
    def average_pair(self, x: Array, buffers: ExchangeBuffers) -> Outcome:
        """Absorb deltas, average with a partner's model, write its delta and the own publication.

        Both sides of an exchange move by exactly the same amounts, so that the sum of all models
        and of the deltas in flight is conserved.

        Args:
            x: own model, shape (elements,), contiguous, on the codec's device; changed in place.
            buffers: messages that are read and written; their bodies are where the device reads and
                writes.

        Returns:
            What was measured: on the host an `ExchangeOutcome`, on a GPU one that may be late.

        Raises:
            MpiDasgdError: a message has another codec, model size or version.
        """

    @abstractmethod
    def delta(self, message: Message) -> Array:
        """Return a delta as numbers, shape (elements,), on the codec's device, for meters."""

    def encode(self, x: Array, out: Message) -> None:
        """Write the model `x`, shape (elements,), to `out`."""
        self.average_pair(x, ExchangeBuffers(publication=out))

    def native_state(self) -> PairCodecStruct | None:
        """Return what the native exchange needs to do what `average_pair` does; None: it cannot.

        What the struct points to belongs to the codec, and changes with each exchange. A subclass
        may average otherwise, and inherits None.
        """
        return None

    def settle(self) -> None:
        """Wait until `counters` hold all exchanges so far.

        Raises:
            DeviceFailed: the device has failed; what it has not finished is not counted.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that a checkpoint must hold, by name."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned."""


def require_float32(name: str, dtype: np.dtype) -> None:
    """Refuse models of another type than float32 for the codec `name`.

    Raises:
        UserError: the type is another one.
    """
    if dtype != np.float32:
        raise UserError(
            f"codec.name: {name!r} takes float32 models, got {dtype}; set 'none', or use float32"
        )


class Seeds:
    """Generator of the seeds of a rank's messages; no two messages of a run have the same.

    Args:
        seed: seed of the run.
        rank: rank that sends the messages.

    Attributes:
        struct: state, which the native exchange changes, too.
    """

    def __init__(self, seed: int, rank: int) -> None:
        start = random.Random(f"mpi_dasgd messages {seed} {rank}").getrandbits(64)
        self.struct = SeedsStruct(start, 0)

    @property
    def drawn(self) -> int:
        """Number of seeds drawn so far."""
        return self.struct.drawn

    @drawn.setter
    def drawn(self, count: int) -> None:
        self.struct.drawn = count

    def draw(self) -> int:
        """Return the next seed, an unsigned 64-bit integer."""
        struct = self.struct
        struct.drawn = drawn = struct.drawn + 1
        return (struct.start + drawn) & 0xFFFFFFFFFFFFFFFF
