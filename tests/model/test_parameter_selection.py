"""Which parameters are exchanged, and what is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.parameter_selection import require_supported, select_parameters


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def _names(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[str]:
    return [name for name, _ in select_parameters(module, optimizer)]


def test_parameters_of_the_module_and_of_the_optimizer_are_exchanged() -> None:
    net = _net()
    every = ["0.weight", "0.bias", "1.weight", "1.bias"]
    head = torch.optim.SGD(net[1].parameters(), lr=0.1)
    assert _names(net, None) == _names(net, head) == every
    extra = nn.Parameter(torch.zeros(1))
    outside = torch.optim.SGD([*net.parameters(), extra], lr=0.1)
    assert _names(net, outside) == [*every, "optimizer.param_groups[0]['params'][4]"]
    assert len(_names(net[1], outside)) == 5


def test_frozen_parameters_are_exchanged_if_the_optimizer_has_them() -> None:
    net = _net()
    net[0].requires_grad_(False)
    assert _names(net, torch.optim.SGD(net[1].parameters(), lr=0.1)) == ["1.weight", "1.bias"]
    assert len(_names(net, torch.optim.SGD(net.parameters(), lr=0.1))) == 4
    counter = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    net.register_parameter("counter", counter)
    assert "counter" not in _names(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_refused() -> None:
    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(UserError, match="none of the trainable parameters of the model"):
        select_parameters(copy.deepcopy(net), optimizer)
    with pytest.raises(UserError, match="no trainable parameters"):
        select_parameters(nn.ReLU(), optimizer)
    net[0].requires_grad_(False)  # what is left to train is not the optimizer's
    with pytest.raises(UserError, match="all of them are frozen"):
        select_parameters(net.requires_grad_(False), torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_parameters_without_values_or_memory_are_refused_by_name() -> None:
    lazy = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(UserError, match=r"parameter 1\.weight is not initialized.*one batch"):
        select_parameters(lazy, None)
    with pytest.raises(UserError, match="parameter weight is on the meta device"):
        select_parameters(nn.Linear(2, 2, device="meta"), None)
    sparse = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(UserError, match=r"w has the layout torch\.sparse_coo"):
        require_supported("w", sparse)
    with pytest.raises(UserError, match=r"w is torch\.float8_e5m2, expected one of bfloat16"):
        require_supported("w", torch.zeros(2).to(torch.float8_e5m2))


def test_parameters_on_several_devices_are_refused() -> None:
    net = _net()
    with pytest.raises(UserError, match="meta"):
        net[1].to("meta")
        select_parameters(net, None)
