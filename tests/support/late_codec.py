"""The exchanges of any codec, made late: what gives memory away too early is found.

The outputs of `LateCodec` hold nothing until they are due, and its inputs must not have changed by
then. Models are not late, and neither are an exchange's changes of them: torch is not late here,
and the next gradient must see them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpi_dasgd.codecs import Codec, ExchangeBuffers, ExchangeOutcome, Message, Outcome
from tests.support.late_device import LateDevice, LateMark

__all__ = ["NOTHING", "LateCodec", "LateWork", "Queue"]

NOTHING = 0xA5  # bytes of an output that is not there yet


class Queue(Protocol):
    """Does work later, in the order in which it is asked for."""

    def submit(self, work: Callable[[], object]) -> None:
        """Have `work` done when all work is that was asked for before, and a delay is over."""


@dataclass
class LateWork:
    """What was found of the exchanges of a device.

    Attributes:
        launches: exchanges done.
        given_back: exchanges of which an input had changed before it was due to be read.
        taken_away: exchanges of which an output had changed before it was due to be written.
        outside: exchanges that were asked for outside of `Device.current_stream`.
    """

    launches: int = 0
    given_back: int = 0
    taken_away: int = 0
    outside: int = 0

    @property
    def wrong(self) -> int:
        """Uses of memory that was given to others before."""
        return self.given_back + self.taken_away


class LateCodec(Codec):
    """The codec of a rank, late: see the module.

    Args:
        inner: codec that computes, on the host.
        queue: when it is due: a `LateDevice`, or the virtual clock.
    """

    def __init__(self, inner: Codec, queue: Queue) -> None:
        self.inner = inner
        self.name, self.layout, self.counters = inner.name, inner.layout, inner.counters
        self.work = LateWork()
        self._queue = queue
        self._spare: deque[Message] = deque()

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> Outcome:
        """Change `x` now, and the messages later; the outcome is as late."""
        partner_model = buffers.partner_model
        inputs = [*buffers.deltas, *([] if partner_model is None else [partner_model])]
        before = [message.body.copy() for message in inputs]
        reply_delta, replies = self._temporary(buffers.reply_delta)
        publication, publications = self._temporary(buffers.publication)
        outputs = replies + publications
        measured = self.inner.average_pair(
            x,
            ExchangeBuffers(
                buffers.deltas,
                partner_model,
                buffers.weight,
                reply_delta,
                publication,
                buffers.update,
            ),
        )
        for real, temporary in outputs:
            real.seed = temporary.seed  # the envelope is the host's
            real.body[:] = NOTHING
        self.work.outside += not getattr(self._queue, "in_stream", True)

        late_device = self._queue if isinstance(self._queue, LateDevice) else None
        mark = None if late_device is None else LateMark(late_device)

        def finish() -> None:
            work = self.work
            work.launches += 1
            work.given_back += any(
                not np.array_equal(message.body, old)
                for message, old in zip(inputs, before, strict=True)
            )
            work.taken_away += any((real.body != NOTHING).any() for real, _ in outputs)
            for real, temporary in outputs:
                real.body[:] = temporary.body
                self._spare.append(temporary)
            if mark is not None:
                mark.pass_()

        self._queue.submit(finish)
        if mark is not None:
            return LateOutcome(measured.value(), mark)
        return measured  # nobody can wait for the virtual clock

    def settle(self) -> None:
        """Wait until all is done."""
        if isinstance(self._queue, LateDevice):
            self._queue.mark().wait()

    def _temporary(self, real: Message | None) -> tuple[Message | None, list]:
        """Return a message to write instead of `real`, and the pair of both in a list."""
        if real is None:
            return None, []
        if self._spare:
            temporary = self._spare.popleft()
        else:
            temporary = Message(np.zeros(self.layout.nbytes, np.uint8), self.layout)
        return temporary, [(real, temporary)]

    def delta(self, message: Message) -> np.ndarray:
        """Return a delta as numbers."""
        return self.inner.delta(message)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays of a checkpoint."""
        return self.inner.state()

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore them."""
        self.inner.load_state(arrays)


class LateOutcome:
    """The outcome of an exchange, known when the device has done it: see `Outcome`."""

    def __init__(self, measured: ExchangeOutcome, mark: LateMark) -> None:
        self._measured, self._mark = measured, mark

    @property
    def is_ready(self) -> bool:
        """Whether it is known."""
        return self._mark.is_done

    def value(self) -> ExchangeOutcome:
        """Wait for it."""
        self._mark.wait()
        return self._measured
