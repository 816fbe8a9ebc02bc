"""Evaluation of a model, of one rank or the mean of all, on the test data."""

from __future__ import annotations

import numpy as np
import torch

from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.tasks.data import Data

__all__ = ["Evaluator"]

# With larger batches the allocator returns the layers' memory of the cnn on 28x28 images to the
# system after each one: 1024 take twice as long on a core.
BATCH = 128


class Evaluator:
    """Test loss and accuracy of a model.

    Args:
        model: module whose parameters are those of `parameters`.
        parameters: flat view of the model.
        buffers: buffers of the model.
        data: task, of which the test data are used.

    Attributes:
        model: the module.
        buffers: its buffers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: FlatParameters,
        buffers: ModelBuffers,
        data: Data,
    ) -> None:
        self.model = model
        self.buffers = buffers
        self._parameters = parameters
        self._data = data

    def evaluate_current(self) -> tuple[float, float]:
        """Return mean cross-entropy and accuracy (0 to 1) of the model as it is."""
        was_training = self.model.training
        self.model.eval()
        loss, correct = 0.0, 0
        with torch.no_grad():
            device = next(self.model.parameters()).device
            for start in range(0, len(self._data.test_x), BATCH):
                x = self._data.inputs(self._data.test_x[start : start + BATCH].to(device))
                y = self._data.test_y[start : start + BATCH].to(device)
                scores = self.model(x)
                loss += torch.nn.functional.cross_entropy(scores, y, reduction="sum").item()
                correct += int((scores.argmax(1) == y).sum())
        self.model.train(was_training)
        return loss / len(self._data.test_x), correct / len(self._data.test_x)

    def set_weights(self, vector: np.ndarray, buffers: np.ndarray) -> None:
        """Set parameters, (padded,), and buffers, as `ModelBuffers.pack` returns them."""
        self._parameters.set(vector)
        self.buffers.unpack(buffers)

    def evaluate(self, vector: np.ndarray, buffers: np.ndarray) -> tuple[float, float]:
        """Return what `evaluate_current` does of other weights, which the model keeps."""
        self.set_weights(vector, buffers)
        return self.evaluate_current()
