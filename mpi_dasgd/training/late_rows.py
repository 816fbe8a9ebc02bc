"""Rows of steps whose figures a device computes later: they are read when it has passed them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mpi_dasgd.errors import DeviceFailed, Diverged
from mpi_dasgd.storage.schema import TrainRow
from mpi_dasgd.training.device_stream import DeviceStream, TimedMark

__all__ = ["LateRows"]


@dataclass(slots=True)
class _Step:
    """A step whose figures may still be on their way.

    Attributes:
        begun: before the copy of its batch.
        updates: begin and end of each step of the optimizer in it.
        loss: its loss, in host memory; there when `computed` is done.
        computed: behind its gradient.
        resumed: behind what slows this rank down; the exchange begins here.
        ended: behind its exchange.
        row: its row, without figures of the device; None while the step is being made.
    """

    begun: TimedMark
    updates: list[tuple[TimedMark, TimedMark]] = field(default_factory=list)
    loss: torch.Tensor | None = None
    computed: TimedMark | None = None
    resumed: TimedMark | None = None
    ended: TimedMark | None = None
    row: TrainRow | None = None


class LateRows:
    """Appends the rows of a rank's steps, in their order, when the device has made them.

    Reading a loss at once would leave the device idle while the host prepares what comes next. So
    the loss of a step is read when the gradient of the next one is queued behind it: the host is
    never ahead by more than that, and the device never waits for it. ::

        rows.begin()
        loss = ...                    # queue forward and backward
        rows.computed(loss)           # queue the copy of the loss, read that of the step before
        training.step(samples)
        rows.end(row)

    Args:
        stream: stream of the device.
        optimizer: optimizer of this rank, whose steps are timed.
        append: takes the finished rows, with `loss`, `compute_s` and `exchange_s`.
        rank, lr: this rank, and its learning rate, for messages.

    Attributes:
        gradient_seconds: time of the device in the newest gradient that was read; 0 until then,
            and during the first steps, which load kernels.
    """

    def __init__(
        self,
        stream: DeviceStream,
        optimizer: torch.optim.Optimizer,
        append: Callable[[TrainRow], None],
        *,
        rank: int,
        lr: float,
    ) -> None:
        self.gradient_seconds = 0.0
        self._stream = stream
        self._append = append
        self._rank = rank
        self._lr = lr
        self._step: _Step | None = None
        self._unread: deque[_Step] = deque()  # loss not looked at: the newest step, or none
        self._unfinished: deque[_Step] = deque()  # loss read, exchange perhaps under way
        self._losses_read = 0
        self._update_begun: TimedMark | None = None
        optimizer.register_step_pre_hook(self._begin_update)
        optimizer.register_step_post_hook(self._end_update)

    def begin(self) -> None:
        """Begin a step: its batch is to be copied."""
        self._step = _Step(self._stream.mark())

    def computed(self, loss: torch.Tensor) -> TimedMark:
        """Note that the gradient of the step is queued, and read the loss of the step before.

        Args:
            loss: loss of the step's batch, on the device, ().

        Returns:
            A mark behind the gradient.

        Raises:
            Diverged: the loss of the step before is not finite.
            DeviceFailed: the device has failed.
        """
        step = self._step
        assert step is not None, "computed() without begin()"
        step.loss = self._stream.to_host(loss)
        step.computed = step.resumed = self._stream.mark()
        self._read()
        return step.computed

    def resume(self) -> None:
        """Note that the rank has been slowed down: what comes now is the exchange."""
        if self._step is not None:
            self._step.resumed = self._stream.mark()

    def end(self, row: TrainRow) -> None:
        """Note that the step is made.

        Args:
            row: its row; `wait_s` is the host's, `loss`, `compute_s` and `exchange_s` are filled in
                when they are there.
        """
        step = self._step
        assert step is not None and step.computed is not None, "end() without computed()"
        step.ended, step.row = self._stream.mark(), row
        self._step = None
        self._unread.append(step)

    def flush(self) -> None:
        """Wait for all steps that were made, and append their rows.

        Raises:
            Diverged: the loss of one is not finite.
            DeviceFailed: the device has failed.
        """
        self._read()
        self._finish(wait=True)

    def salvage(self) -> None:
        """Append what can still be had, at the end of a run that failed."""
        try:
            self.flush()
        except (DeviceFailed, Diverged):
            self._unread.clear()

    def _read(self) -> None:
        """Read the losses of the steps that were made, and append the rows that are complete."""
        while self._unread:
            step = self._unread[0]
            assert step.loss is not None and step.computed is not None and step.row is not None
            step.computed.wait()
            self._losses_read += 1
            if self._losses_read > 1:
                self.gradient_seconds = step.computed.seconds_since(step.begun)
            step.row.loss = loss = step.loss.item()
            if not math.isfinite(loss):
                self._finish(wait=True)
                raise Diverged(
                    f"loss of rank {self._rank} became {loss} at its step {step.row.step}, which "
                    "was seen a step later, when the GPU had computed it; try a smaller "
                    f"optimizer.lr than {self._lr:g}"
                )
            self._unfinished.append(self._unread.popleft())
        self._finish(wait=False)

    def _finish(self, *, wait: bool) -> None:
        """Append the rows of steps whose exchange the device has passed, or wait until it has."""
        while self._unfinished:
            step = self._unfinished[0]
            row, resumed, ended = step.row, step.resumed, step.ended
            assert row is not None and resumed is not None and ended is not None
            assert step.computed is not None
            if wait:
                ended.wait()
            elif not ended.is_done:
                return
            updating = sum(end.seconds_since(begin) for begin, end in step.updates)
            exchanging = ended.seconds_since(resumed) - updating - row.wait_s
            row.compute_s = step.computed.seconds_since(step.begun) + updating
            row.exchange_s = max(0.0, exchanging)
            self._append(row)
            self._unfinished.popleft()

    def _begin_update(self, *_: object) -> None:
        self._update_begun = self._stream.mark()

    def _end_update(self, *_: object) -> None:
        begun, self._update_begun = self._update_begun, None
        if begun is not None and self._step is not None:
            self._step.updates.append((begun, self._stream.mark()))
