"""All ranks begin with the same model, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.training.flat_parameters import FlatParameters
from mpi_dasgd.training.synchronize import broadcast_parameters


class Comm:
    """Communicator of two ranks, of which this is rank 1; `gathered` returns what rank 0 has."""

    def __init__(self, root: FlatParameters, gathered: Callable[[Any], Any]) -> None:
        self._vectors = iter([root.host_view.copy(), root.buffers()])
        self._gathered = gathered

    def allgather(self, value: Any) -> list[Any]:
        """Return rank 0's value and this rank's."""
        return [self._gathered(value), value]

    def Bcast(self, array: np.ndarray, root: int) -> None:  # noqa: N802
        """Copy rank 0's array."""
        assert root == 0
        array[:] = next(self._vectors)


def _model(value: float) -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


def test_parameters_and_buffers_become_those_of_rank_0() -> None:
    model = _model(1)
    comm: Any = Comm(FlatParameters(_model(4)), lambda value: value)
    broadcast_parameters(comm, FlatParameters(model))
    for tensor in (*model.parameters(), *model.buffers()):
        assert (tensor == 4).all()


def test_models_of_different_sizes_are_refused() -> None:
    parameters = FlatParameters(_model(1))
    comm: Any = Comm(parameters, lambda sizes: (sizes[0] + 1, sizes[1]))
    with pytest.raises(
        UserError, match=r"the ranks must have the same model.*\(13, 5\), \(12, 5\)"
    ):
        broadcast_parameters(comm, parameters)


def test_weights_that_differ_after_the_broadcast_are_noticed() -> None:
    parameters = FlatParameters(_model(1))
    comm: Any = Comm(parameters, lambda value: "another" if isinstance(value, str) else value)
    with pytest.raises(PeerLost, match="do not have the same initial weights"):
        broadcast_parameters(comm, parameters)
