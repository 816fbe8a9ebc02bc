"""Random exchanges of a few ranks, the same ones in several memories: for codecs on a device."""

from __future__ import annotations

import contextlib
from collections import deque
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.codecs import Codec, ExchangeBuffers, Message
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.device.host import HOST
from mpi_dasgd.kernels.optimizer import GROUP, SEGMENT, SGD, OptimizerStep, adam_group, sgd_group

__all__ = ["FLOAT32", "POISON", "RANKS", "HostMemory", "Memory", "Turn", "World", "make", "plain"]

FLOAT32 = np.dtype(np.float32)
RANKS = 3
POISON = 400  # exchange from which models have NaN and infinities


class Memory(Protocol):
    """Where a world's models and messages are, and how a test reads and writes them."""

    device: Any

    def allocate(self, nbytes: int) -> Any:
        """Zeros, uint8."""

    def read(self, array: Any) -> np.ndarray:
        """A copy."""

    def write(self, array: Any, values: np.ndarray) -> None:
        """Write all of it."""

    def exchange(self) -> AbstractContextManager[None]:
        """In the ``with`` block a codec works."""


class HostMemory:
    """NumPy's."""

    device = HOST

    def allocate(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def read(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def write(self, array: np.ndarray, values: np.ndarray) -> None:
        array[...] = values

    def exchange(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def make(name: str, elements: int, rank: int, device: Any = HOST) -> Codec:
    """Return the codec of a rank; its messages have 3 trailer words."""
    settings = CodecConfig(name=name)  # type: ignore[arg-type]
    return codecs.make(
        settings, elements, FLOAT32, seed=1, rank=rank, trailer_words=3, device=device
    )


class Turn:
    """A random exchange, the same in all worlds.

    Args:
        rng: source of the choices.
        number: number of the exchange.
        world: one of the worlds.
    """

    def __init__(self, rng: np.random.Generator, number: int, world: World) -> None:
        elements = world.elements
        self.rank = int(rng.integers(RANKS))
        others = [r for r in range(RANKS) if r != self.rank and world.publications[r] is not None]
        self.partner = int(rng.choice(others)) if others and rng.random() < 0.8 else None
        self.absorbed = min(int(rng.integers(0, 7)), len(world.deltas[self.rank]))
        if rng.random() < 0.5:
            self.absorbed = 0  # so that some absorb many at once
        self.replies, self.publishes = rng.random() < 0.9, rng.random() < 0.8
        self.weight = float(rng.choice([0.5, 0.3, 0.25]))
        self.corrupt = int(rng.integers(1 << 30)) if rng.random() < 0.1 else None
        size = 10.0 ** rng.uniform(-5, -1) if rng.random() < 0.9 else 10.0  # else: rejections
        self.update = (rng.normal(size=elements) * size).astype(np.float32)
        self.update[rng.random(elements) < 0.5] = 0
        self.kind = int(rng.integers(3))  # of an optimizer, whose gradient the update is; 0: none
        self.step = number + 1
        self.poison: int | None = None
        # A lattice codec keeps to itself what is not finite; others spread it to all.
        if number >= POISON and (world.is_lattice or number == POISON) and number % 10 == 0:
            self.poison = int(rng.integers(elements))
        self.poison_value = np.float32(np.nan if number % 20 else np.inf)


class World:
    """The ranks of a run in one memory, with all that they have sent.

    Args:
        name: name of the codec.
        elements: elements of the models.
        memory: where they are.

    Attributes:
        copies: arrays that the device has copied from or to the host during exchanges.
        waits: marks that were waited for meanwhile.
        outcomes: of all exchanges.
    """

    def __init__(self, name: str, elements: int, memory: Memory) -> None:
        self.memory, self.elements = memory, elements
        self.is_lattice = name.startswith("lattice")
        self.codecs = [make(name, elements, rank, memory.device) for rank in range(RANKS)]
        start = np.random.default_rng(elements).normal(size=elements).astype(np.float32)
        start[1024:2048] = 0
        self.models = [self._vector() for _ in range(RANKS)]
        self.updates = [self._new_update() for _ in range(RANKS)]
        for model in self.models:
            memory.write(model, start)
        self.publications: list[Message | None] = [None] * RANKS
        self.deltas: list[deque[Message]] = [deque() for _ in range(RANKS)]
        self.outcomes: list[Any] = []
        self.copies = self.waits = 0

    def message(self, rank: int) -> Message:
        """Return a new message of `rank`; on a device its body is there."""
        layout = self.codecs[rank].layout
        if self.memory.device is HOST:
            message = Message(np.zeros(layout.nbytes, np.uint8), layout)
        else:
            envelope = np.zeros(layout.envelope_nbytes, np.uint8)
            message = Message(envelope, layout, body=self.memory.allocate(layout.body_nbytes))
        message.stamp(rank=rank, step=0, time_ns=0)
        return message

    def exchange(self, turn: Turn) -> list[Message]:
        """Do one exchange; return the messages that it wrote."""
        rank, partner = turn.rank, turn.partner
        own, x = self.codecs[rank], self.models[rank]
        values = self.memory.read(x)
        if turn.kind == 0:
            values += turn.update
        if turn.poison is not None:
            values[turn.poison] = turn.poison_value
        self.memory.write(x, values)
        received = [self.deltas[rank].popleft() for _ in range(turn.absorbed)]
        theirs = None if partner is None else self.publications[partner]
        for message in (*received, theirs):
            if message is not None and turn.corrupt is not None:
                body = self.memory.read(message.body)
                body[turn.corrupt % body.size] ^= 8
                self.memory.write(message.body, body)
        reply = self.message(rank) if theirs is not None and turn.replies else None
        publication = self.message(rank) if turn.publishes else None
        update = self._update(turn) if turn.kind else None
        buffers = ExchangeBuffers(received, theirs, turn.weight, reply, publication, update)
        device = self.memory.device
        before = getattr(device, "copies", 0), getattr(device, "waits", 0)
        with self.memory.exchange():
            self.outcomes.append(own.average_pair(x, buffers))
        self.copies += getattr(device, "copies", 0) - before[0]
        self.waits += getattr(device, "waits", 0) - before[1]
        if reply is not None and partner is not None:
            self.deltas[partner].append(reply)
        if publication is not None:
            self.publications[rank] = publication
        return [message for message in (reply, publication) if message is not None]

    def _update(self, turn: Turn) -> OptimizerStep:
        """Return the step of an optimizer, with the state of its rank."""
        update = self.updates[turn.rank]
        gradients = update.gradients
        self.memory.write(gradients, turn.update)
        at = gradients.ctypes.data if self.memory.device is HOST else gradients.data.ptr
        update.segments["gradient"] = at + 4 * update.segments["offset"]
        update.segments["gradient"][turn.step % 7 :: 7] = 0
        update.groups[0] = (
            sgd_group(0.5, 0.7, weight_decay=1e-3)
            if turn.kind == SGD
            else adam_group(1e-3, (0.9, 0.99), 1e-8, 1e-2, turn.step, decoupled=True)
        )
        return update

    def _new_update(self) -> OptimizerStep:
        """Return room for steps of an optimizer: ten parameters, with gaps between them."""
        segments = np.zeros(10, SEGMENT)
        segments["offset"] = np.arange(10) * (self.elements // 40 * 4)
        segments["count"] = self.elements // 10 - 3
        state = (self._vector() for _ in range(2))
        update = OptimizerStep(segments, np.zeros(1, GROUP), *state)
        update.gradients = self._vector()
        return update

    def _vector(self) -> Any:
        return self.memory.allocate(4 * self.elements).view(np.float32)

    def content(self, message: Message) -> bytes:
        """Return the bytes of a message, with the same bits for all NaN."""
        name = self.codecs[0].name
        if name in ("none", "fp16"):
            return plain(self.memory.read(message.payload)).tobytes() + message.envelope.tobytes()
        body = self.memory.read(message.body)
        if name == "bf16":
            codes = body.view(np.uint16)
            codes[(codes & 0x7FFF) > 0x7F80] = 0x7FC0
        return body.tobytes() + message.envelope.tobytes()

    def model(self, rank: int) -> bytes:
        """Return the bytes of a model and its optimizer's state, with the same bits for all NaN."""
        vectors = self.models[rank], self.updates[rank].first, self.updates[rank].second
        return b"".join(plain(self.memory.read(vector)).tobytes() for vector in vectors)

    def scales(self, rank: int) -> tuple[bytes, ...]:
        """Return the bytes of a rank's estimates and last scales."""
        scale: Any = getattr(self.codecs[rank], "scale", None)
        if scale is None:
            return ()
        if self.memory.device is HOST:
            arrays = scale.estimate, scale._last_scales
        else:
            arrays = scale.estimate, scale._scales.last
        return tuple(self.memory.read(array).tobytes() for array in arrays)


def plain(values: np.ndarray) -> np.ndarray:
    """Return numbers with the same bits for all NaN: processors choose them freely."""
    if values.dtype.kind == "f":
        values[np.isnan(values)] = np.nan
    return values
