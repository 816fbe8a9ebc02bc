"""Evaluation: each rank's model along the way, and the mean of all models afterwards.

At every milestone of the budget each rank puts a snapshot of its model on disk. When training is over
the mean of the snapshots of one milestone is evaluated: that costs the training nothing, needs no
collective call while it runs, and survives ranks that died.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mpi_dasgd.storage.writer_thread import writer
from mpi_dasgd.tasks.data import Data
from mpi_dasgd.training.flat_parameters import FlatParameters

__all__ = ["Evaluator", "Snapshots"]

# With larger ones the cnn on 28x28 images gets the memory of its layers anew from the system in each
# batch: 1024 take twice as long on a core.
BATCH = 128


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

    def evaluate_current(self) -> tuple[float, float]:
        """Return mean cross-entropy and accuracy (0 to 1) of the model as it is."""
        was_training = self._model.training
        self._model.eval()
        loss, right = 0.0, 0
        with torch.no_grad():
            device = next(self._model.parameters()).device
            for start in range(0, len(self._data.test_x), BATCH):
                x = self._data.inputs(self._data.test_x[start : start + BATCH].to(device))
                y = self._data.test_y[start : start + BATCH].to(device)
                scores = self._model(x)
                loss += torch.nn.functional.cross_entropy(scores, y, reduction="sum").item()
                right += int((scores.argmax(1) == y).sum())
        self._model.train(was_training)
        return loss / len(self._data.test_x), right / len(self._data.test_x)

    def evaluate(self, vector: np.ndarray, buffers: np.ndarray) -> tuple[float, float]:
        """Return the same for other weights, which the model keeps."""
        self._parameters.set(vector)
        self._parameters.set_buffers(buffers)
        return self.evaluate_current()


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
        *,
        model: np.ndarray | None = None,
    ) -> None:
        """Copy a model and write it in the background.

        Args:
            milestone, rank: which one it is.
            parameters: the rank's model, with its buffers.
            time_s, samples, progress: when: seconds, samples of the rank, and of all ranks.
            model: in its place, if the rank keeps another one for the run.
        """
        parameters.copy_to_host()
        values = {
            "model": (parameters.host_view if model is None else model).copy(),
            "buffers": parameters.buffers(),
            "when": np.array([time_s, samples, progress], np.float64),
        }
        path = self._path(milestone, rank)

        def write() -> None:
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, allow_pickle=False, **values)
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
        shutil.rmtree(self._directory, ignore_errors=True)
