"""Test loss and accuracy of a model, and of other weights in its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.tasks.data import Data
from mpi_dasgd.training.evaluator import BATCH, Evaluator


@pytest.mark.parametrize("samples", [10, BATCH + 1, 3 * BATCH])
def test_all_test_samples_count_alike(samples: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 3), torch.randint(2, (samples,))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    model.train()
    evaluator = Evaluator(model, FlatParameters(model), ModelBuffers(model), Data(x, y, x, y, 2))
    loss, accuracy = evaluator.evaluate_current()
    assert model.training  # as before, though it was evaluated without dropout
    scores = model[0](x)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(scores, y).item(), rel=1e-5)
    assert accuracy == (scores.argmax(1) == y).double().mean().item()


def test_other_weights_are_evaluated_with_their_buffers_and_stay() -> None:
    x, y = torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([0, 1])
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2, affine=False), torch.nn.Linear(2, 2))
    parameters = FlatParameters(model)
    vector = np.zeros(parameters.host_view.size)
    vector[[0, 3]] = 1.0  # the identity, no bias
    batch_norm: Any = model[0]
    batch_norm.running_mean[:] = torch.tensor([2.0, 0.0])
    module_buffers = ModelBuffers(model, set(map(id, parameters.parameters)))
    buffers = module_buffers.pack()
    batch_norm.reset_running_stats()
    evaluator = Evaluator(model, parameters, module_buffers, Data(x, y, x, y, 2))
    _, accuracy = evaluator.evaluate(vector, buffers)
    assert accuracy == 1.0  # without the mean of 2 the first class would win more
    np.testing.assert_array_equal(module_buffers.pack(), buffers)
    np.testing.assert_array_equal(parameters.host_view, vector)
    _, accuracy = evaluator.evaluate(-vector, buffers)
    assert accuracy == 0.0
