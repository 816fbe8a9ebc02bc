"""Buffers that lie in the memory of a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.buffer_aliases import BufferAliases
from mpi_dasgd.training.flat_parameters import FlatParameters
from mpi_dasgd.training.model_buffers import ModelBuffers


def _module(buffer: Any) -> torch.nn.Linear:
    module = torch.nn.Linear(3, 2)
    module.register_buffer("alias", buffer(module.weight.detach()))
    module.register_buffer("own", torch.zeros(2))
    return module


@pytest.mark.parametrize(
    "view",
    [lambda w: w, lambda w: w[1], lambda w: w.t(), lambda w: w[:, 1:], lambda w: w.view(-1)[2:5]],
)
def test_a_view_of_a_parameter_stays_one_and_is_no_buffer_of_its_own(view: Any) -> None:
    module = _module(view)
    aliases = BufferAliases(module)
    flat = FlatParameters(module)
    aliases.restore()
    flat.host_view[: flat.size] = range(flat.size)
    assert torch.equal(module.get_buffer("alias"), view(module.weight.detach()))
    buffers = ModelBuffers(module, set(map(id, flat.parameters)))
    assert [name for name, _ in buffers.description()] == ["own"]


def test_more_than_a_view_of_one_parameter_is_refused() -> None:
    memory = torch.zeros(10)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(memory[2:6])
    module.register_buffer("alias", memory)
    aliases = BufferAliases(module)
    FlatParameters(module)
    with pytest.raises(UserError, match="buffer alias shares memory with parameter weight"):
        aliases.restore()


def test_parameters_that_stay_where_they_are_need_nothing() -> None:
    memory = torch.zeros(10)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(memory[2:6])
    module.register_buffer("alias", memory)
    BufferAliases(module).restore()
    assert module.get_buffer("alias").data_ptr() == memory.data_ptr()
