"""A step of the trainer: batch, gradient, straggler, step of the training, and its row."""

from __future__ import annotations

import math
import time
from typing import Protocol

from mpi_dasgd.errors import Diverged
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.device_stream import DeviceStream, device_stream
from mpi_dasgd.training.late_rows import LateRows
from mpi_dasgd.training.recorder import Recorder
from mpi_dasgd.training.workload import Workload

__all__ = ["DeviceStep", "HostStep", "TrainerStep", "prepare_step"]


class TrainerStep(Protocol):
    """Makes the steps of one rank, and records them."""

    def make(self) -> None:
        """Make a step.

        Raises:
            Diverged: its loss, or that of a step before, is not finite.
        """

    def flush(self) -> None:
        """Wait until all steps that were made are recorded, and the model is known to be finite.

        Raises:
            Diverged: the loss of one, or the model after it, is not finite.
        """

    def salvage(self) -> None:
        """Record what can still be had of the steps made, at the end of a run that failed."""


class HostStep:
    """Makes steps on the host, whose work is done when its call returns; see `TrainerStep`.

    Args:
        training: training of this rank.
        workload: what it computes.
        recorder: record of the rank.
    """

    def __init__(self, training: Decentralized, workload: Workload, recorder: Recorder) -> None:
        self._training = training
        self._workload = workload
        self._recorder = recorder

    def make(self) -> None:
        """Make a step and record it."""
        training, workload = self._training, self._workload
        local_step = training.local.local_step
        started = time.perf_counter()
        x, y = workload.batches.batch(local_step)
        loss = workload.compute_gradient(x, y)
        if not math.isfinite(loss):
            raise Diverged(
                f"loss of rank {training.rank} became {loss} at its step {local_step + 1}; "
                f"try a smaller optimizer.lr than {training.config.optimizer.lr:g}"
            )
        computed = time.perf_counter() - started
        if workload.straggler.active:
            workload.straggler.slow_down(
                local_step, computed, lambda: workload.compute_gradient(x, y)
            )
        exchanged, waited = training.exchange_seconds, training.wait_seconds
        started = time.perf_counter()
        training.step(len(x))
        computed += time.perf_counter() - started
        exchanged, waited = training.exchange_seconds - exchanged, training.wait_seconds - waited
        self._recorder.record_step(
            loss,
            compute_seconds=computed - exchanged,
            exchange_seconds=exchanged - waited,
            wait_seconds=waited,
        )

    def flush(self) -> None:
        """Do nothing: every step is recorded."""

    def salvage(self) -> None:
        """Do nothing: every step is recorded."""


class DeviceStep:
    """Makes steps on a device without waiting for it; see `TrainerStep`.

    A step is recorded when its figures are there, one step later; see `LateRows`.

    Args:
        training: training of this rank.
        workload: what it computes, on the device.
        recorder: record of the rank.
        stream: stream of the device.
    """

    def __init__(
        self,
        training: Decentralized,
        workload: Workload,
        recorder: Recorder,
        stream: DeviceStream,
    ) -> None:
        self._training = training
        self._workload = workload
        self._recorder = recorder
        self._stream = stream
        self._rows = LateRows(
            stream,
            workload.optimizer,
            recorder.append_step,
            rank=training.rank,
            lr=training.config.optimizer.lr,
        )

    def make(self) -> None:
        """Ask the device for a step."""
        training, workload, rows = self._training, self._workload, self._rows
        stream, straggler = self._stream, workload.straggler
        local_step = training.local.local_step
        rows.begin()
        x, y = map(stream.to_device, workload.batches.batch(local_step))
        computed = rows.computed(workload.queue_gradient(x, y))
        if straggler.active:
            straggler.slow_down(
                local_step,
                rows.gradient_seconds,
                lambda: workload.queue_gradient(x, y),
                wait=computed.wait,
                keep_busy=stream.keep_busy,
            )
            rows.resume()
        waited = training.wait_seconds
        training.step(len(x))
        rows.end(self._recorder.describe_step(training.wait_seconds - waited))

    def flush(self) -> None:
        """Wait until all steps that were made are recorded, and the model is known to be finite."""
        self._rows.flush()
        self._training.local.require_finite_updates()

    def salvage(self) -> None:
        """Record what the device has still computed."""
        self._rows.salvage()


def prepare_step(
    device: str, training: Decentralized, workload: Workload, recorder: Recorder
) -> TrainerStep:
    """Return what makes the steps of a rank whose model is on `device`, in torch's notation."""
    stream = device_stream(device)
    if stream is None:
        return HostStep(training, workload, recorder)
    return DeviceStep(training, workload, recorder, stream)
