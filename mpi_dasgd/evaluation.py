"""Evaluation: each rank's model along the way, and the mean of all models afterwards.

At every milestone of the budget each rank puts a snapshot of its model on disk. When training is over
the mean of the snapshots of one milestone is evaluated: that costs the training nothing, needs no
collective call while it runs, and survives ranks that died.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mpi_dasgd.parameters import FlatParameters
from mpi_dasgd.storage.results import gather
from mpi_dasgd.storage.writer import writer
from mpi_dasgd.tasks.data import Data

__all__ = ["Evaluator", "Snapshots", "consensus_table", "own_accuracies", "wait_until_closed"]

BATCH = 1024


class Evaluator:
    """Test loss and accuracy of a model.

    Args:
        model: its parameters are those of `parameters`.
        parameters: flat view of the model.
        data: the task; the test set counts.
    """

    def __init__(self, model: torch.nn.Module, parameters: FlatParameters, data: Data) -> None:
        self._model = model
        self._parameters = parameters
        self._data = data

    def current(self) -> tuple[float, float]:
        """Return mean cross-entropy and accuracy (0 to 1) of the model as it is."""
        was_training = self._model.training
        self._model.eval()
        loss, right = 0.0, 0
        with torch.no_grad():
            device = next(self._model.parameters()).device
            for start in range(0, len(self._data.test_x), BATCH):
                x = self._data.test_x[start : start + BATCH].to(device)
                y = self._data.test_y[start : start + BATCH].to(device)
                scores = self._model(x)
                loss += torch.nn.functional.cross_entropy(scores, y, reduction="sum").item()
                right += int((scores.argmax(1) == y).sum())
        self._model.train(was_training)
        return loss / len(self._data.test_x), right / len(self._data.test_x)

    def of(self, vector: np.ndarray, buffers: np.ndarray) -> tuple[float, float]:
        """Return the same for other weights, which the model keeps."""
        self._parameters.set(vector)
        self._parameters.set_buffers(buffers)
        return self.current()


class Snapshots:
    """Models of all ranks at the milestones, as files of one directory.

    Args:
        directory: of the run's snapshots.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, milestone: int, rank: int) -> Path:
        return self._directory / f"m{milestone:05d}-r{rank:05d}.npz"

    def save(
        self,
        milestone: int,
        rank: int,
        parameters: FlatParameters,
        time_s: float,
        samples: int,
        progress: int,
    ) -> None:
        """Copy a model and write it in the background."""
        parameters.pull()
        values = {
            "model": parameters.host.copy(),
            "buffers": parameters.buffers(),
            "when": np.array([time_s, samples, progress], np.float64),
        }
        path = self._path(milestone, rank)

        def write() -> None:
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, **values)
            os.replace(temporary, path)  # noqa: PTH105

        writer().submit(write)

    def load(self, milestone: int, rank: int) -> Mapping[str, np.ndarray] | None:
        """Return model, buffers and when (seconds, samples, progress), or None if there is no such."""
        path = self._path(milestone, rank)
        if not path.exists():
            return None
        with np.load(path) as file:
            return {name: file[name] for name in file.files}

    def remove(self) -> None:
        """Delete all."""
        for path in self._directory.glob("*.npz"):
            path.unlink()
        self._directory.rmdir()


def wait_until_closed(directory: Path, ranks: Sequence[int], timeout: float) -> None:
    """Wait until the run files of `ranks` are closed, or `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        results = gather(directory)
        status = dict(zip(results.rank.tolist(), results.ranks["status"].tolist(), strict=True))
        if all(status.get(rank, "running") != "running" for rank in ranks):
            return
        time.sleep(0.05)


def own_accuracies(directory: Path) -> dict[tuple[int, int], float]:
    """Return what the ranks measured of their own models, by milestone and rank."""
    results = gather(directory)
    table = results.tables["evaluation"]
    return {
        (int(table["milestone"][row, record]), int(rank)): float(
            table["test_accuracy"][row, record]
        )
        for row, rank in enumerate(results.rank)
        for record in range(results.records["evaluation"][row])
    }


def consensus_table(
    milestones: Sequence[int],
    ranks: Sequence[int],
    snapshots: Snapshots,
    evaluator: Evaluator,
    known: Mapping[tuple[int, int], float],
) -> dict[str, list[float]]:
    """Evaluate the mean model, and each rank's, at `milestones`.

    Args:
        milestones: those to evaluate; one that lacks a rank's snapshot is left out.
        ranks: whose models make the mean.
        snapshots: where they are.
        evaluator: evaluates; its model is changed.
        known: accuracies measured before, by milestone and rank.

    Returns:
        Columns of `mpi_dasgd.storage.schema.CONSENSUS`, one entry a milestone.
    """
    table: dict[str, list[float]] = {
        name: []
        for name in (
            "milestone", "progress", "samples", "time", "mean_test_loss", "mean_test_accuracy",
            "worst_test_accuracy", "best_test_accuracy", "consensus_distance", "consensus_relative",
        )
    }  # fmt: skip
    for milestone in milestones:
        found = [snapshots.load(milestone, rank) for rank in ranks]
        loaded = [snapshot for snapshot in found if snapshot is not None]
        if len(loaded) < len(found) or not loaded:
            continue
        models = [snapshot["model"] for snapshot in loaded]
        mean = np.mean(models, axis=0, dtype=np.float64)
        buffers = np.mean([snapshot["buffers"] for snapshot in loaded], axis=0)
        distance = float(np.mean([np.square(model - mean).sum() for model in models]))
        accuracies = [
            known[milestone, rank]
            if (milestone, rank) in known
            else evaluator.of(snapshot["model"], snapshot["buffers"])[1]
            for rank, snapshot in zip(ranks, loaded, strict=True)
        ]
        loss, accuracy = evaluator.of(mean.astype(np.float32), buffers)
        when = np.array([snapshot["when"] for snapshot in loaded])
        row = {
            "milestone": milestone,
            "progress": when[:, 2].max(),
            "samples": when[:, 1].sum(),
            "time": when[:, 0].max(),
            "mean_test_loss": loss,
            "mean_test_accuracy": accuracy,
            "worst_test_accuracy": min(accuracies),
            "best_test_accuracy": max(accuracies),
            "consensus_distance": distance,
            "consensus_relative": distance / max(float(np.square(mean).sum()), 1e-300),
        }
        for name, value in row.items():
            table[name].append(float(value))
    return table
