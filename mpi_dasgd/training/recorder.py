"""Record of a rank's training: rows of its run file, and the text of the progress line."""

from __future__ import annotations

import math
import time

import numpy as np

from mpi_dasgd.storage.runfile import RunFile
from mpi_dasgd.storage.schema import APPLIED, INITIATED, EvaluationRow, TrainRow
from mpi_dasgd.training.decentralized import Decentralized
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer

__all__ = ["Recorder"]

_RECENT_EXCHANGES = 1000  # over which the progress line averages


class Recorder:
    """Appends what a rank does to its run file, and sums it up in one line.

    Args:
        file: run file of this rank.
        training: training of this rank.

    Attributes:
        loss: training loss of the newest batch; NaN before the first.
    """

    def __init__(self, file: RunFile, training: Decentralized) -> None:
        self.loss = math.nan
        self._file = file
        self._training = training
        self._append_step = file.rings["train"].append
        self._recent_ages = np.zeros(0, np.int64)
        self._oldest = 0
        file.rings["exchange"].on_taken = self._note_ages
        self._accuracy: float | None = None

    def record_step(
        self, loss: float, *, compute_seconds: float, exchange_seconds: float, wait_seconds: float
    ) -> None:
        """Record the step just made.

        Args:
            loss: training loss of its batch.
            compute_seconds: time in forward, backward, and the optimizer.
            exchange_seconds: time in the exchange, without waiting.
            wait_seconds: time spent waiting for other ranks.
        """
        self.loss = loss
        training = self._training
        budget, local, learning_rate = training.budget, training.local, training.learning_rate
        self._append_step(  # by place, in the order of `TrainRow`: names cost half a microsecond
            local.local_step,
            time.monotonic() - budget.origin,
            budget.samples,
            budget.total_samples,
            loss,
            _learning_rate(local),
            compute_seconds,
            exchange_seconds,
            wait_seconds,
            learning_rate.delay,
            learning_rate.delay_factor,
        )

    def describe_step(self, wait_seconds: float) -> TrainRow:
        """Return the row of the step just made, whose loss and times of computing are NaN.

        Args:
            wait_seconds: time spent waiting for other ranks.
        """
        training = self._training
        return TrainRow(
            step=training.local.local_step,
            time_s=training.elapsed,
            samples=training.samples,
            total_samples=training.total_samples,
            loss=math.nan,
            learning_rate=_learning_rate(training.local),
            compute_s=math.nan,
            exchange_s=math.nan,
            wait_s=wait_seconds,
            delay=training.delay,
            delay_factor=training.delay_factor,
        )

    def append_step(self, row: TrainRow) -> None:
        """Record a step by its row, which is complete."""
        self.loss = row.loss
        self._file.append(row)

    def record_evaluation(
        self, milestone: int, when: tuple[float, int, int], loss: float, accuracy: float
    ) -> None:
        """Record test loss and accuracy (0 to 1) of this rank's model at a milestone.

        Args:
            milestone: index of the milestone, from 1.
            when: seconds of training, samples of this rank, and samples of all ranks.
            loss, accuracy: what was measured.
        """
        self._accuracy = accuracy
        elapsed, samples, total_samples = when
        self._file.append(
            EvaluationRow(
                milestone=milestone,
                step=self._training.local.local_step,
                time_s=elapsed,
                samples=samples,
                total_samples=total_samples,
                test_loss=loss,
                test_accuracy=accuracy,
            )
        )

    def close(self, status: str) -> None:
        """Close the run file, with the counters of the run and `status`, how the rank ended."""
        training = self._training
        self._file.close(
            status,
            {
                **training.counters,
                "steps": training.local.local_step,
                "samples": training.samples,
                "wall_s": training.elapsed,
                "cpu_s": time.process_time(),
            },
        )

    def _note_ages(self, rows: np.ndarray) -> None:
        """Note the ages of partners' models and of gradients, for the progress line."""
        ages = rows["age_steps"][np.isin(rows["kind"], (INITIATED, APPLIED))]
        ages = np.concatenate([self._recent_ages, np.maximum(0, ages)])
        self._recent_ages = ages[-_RECENT_EXCHANGES:]
        self._oldest = max(self._oldest, int(ages.max(initial=0)))

    def progress_text(self) -> str:
        """Return the state of the run in one line."""
        training = self._training
        self._file.rings["exchange"].spill()  # so that the newest ages are noted
        speed = training.total_samples / max(training.elapsed, 1e-9)
        parts = [
            f"{training.algorithm.name} {100 * training.progress:3.0f} %",
            f"{speed:,.0f} samples/s",
        ]
        if training.computes_gradients and not math.isnan(self.loss):  # a GPU's comes later
            parts.append(f"loss {self.loss:.4f}")
        if self._accuracy is not None:
            parts.append(f"accuracy {100 * self._accuracy:.1f} % (rank {training.rank})")
        if len(self._recent_ages):
            mean = np.mean(self._recent_ages)
            parts.append(f"staleness {mean:.1f} steps, at most {self._oldest}")
        counters = training.codec.counters
        if rejected := counters.get("buckets_rejected"):
            fraction = rejected / (rejected + counters["buckets_decoded"])
            parts.append(f"{100 * fraction:.2g} % of buckets not decoded")
        return "  ".join(parts)


def _learning_rate(local: TorchLocalOptimizer) -> float:
    """Return the learning rate of a rank's newest gradient, also where a server applies it."""
    has_updated = local.update_seconds > 0  # else it is the rate without our factors
    return local.lr if has_updated else local.lr * local.lr_scale
