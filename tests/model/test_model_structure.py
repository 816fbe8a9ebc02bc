"""Parameters that are replaced or added after wrapping: refused where they would train alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.model_structure import ModelStructure


class _Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).T


def _net() -> tuple[nn.Sequential, torch.optim.Optimizer, ModelStructure]:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net, optimizer, ModelStructure(net, optimizer, list(net.parameters()))


def _refusal(structure: ModelStructure) -> str:
    assert not structure.is_unchanged
    with pytest.raises(UserError) as raised:
        structure.require_unchanged()
    return str(raised.value)


def test_replaced_parameters_are_refused_by_name() -> None:
    net, _, structure = _net()
    assert structure.is_unchanged
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    assert "parameter 0.weight is another object" in _refusal(structure)
    net, _, structure = _net()
    net[2] = nn.Linear(3, 4)
    assert "parameter 2.weight is another object" in _refusal(structure)
    net, _, structure = _net()
    parametrizations.weight_norm(net[0])
    assert "parametrizations.weight.original0 did not exist" in _refusal(structure)


def test_added_parameters_are_refused_by_name() -> None:
    net, optimizer, structure = _net()
    net.add_module("late", nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"late\.weight did not exist"):
        structure.require_unchanged()
    net, optimizer, structure = _net()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert "param_groups[1]['params'][0] was added" in _refusal(structure)
    net, optimizer, structure = _net()
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.zeros(3))
    assert "param_groups[0]['params'][1] was added" in _refusal(structure)


def test_a_parameter_that_was_frozen_and_not_the_optimizers_is_refused_as_a_group() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].requires_grad_(False)
    optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)
    structure = ModelStructure(net, optimizer, list(net[1].parameters()))
    net[0].requires_grad_(True)  # by itself it changes nothing: the optimizer does not have it
    structure.require_unchanged()
    optimizer.add_param_group({"params": list(net[0].parameters())})
    assert "parameter 0.weight was added" in _refusal(structure)


def test_what_goes_on_to_be_exchanged_is_allowed() -> None:
    net, optimizer, structure = _net()
    parametrize.register_parametrization(net[0], "weight", _Symmetric())
    prune.l1_unstructured(net[2], "weight", amount=0.5)
    structure.require_unchanged()
    assert structure.is_unchanged
    parametrize.remove_parametrizations(net[0], "weight")
    prune.remove(net[2], "weight")
    structure.require_unchanged()
    first, *others = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = others
    optimizer.add_param_group({"params": [first], "lr": 0.01})
    structure.require_unchanged()
    net[1] = nn.Tanh()
    net[2].weight = net[0].weight
    net.register_parameter("frozen", nn.Parameter(torch.zeros(1), requires_grad=False))
    structure.require_unchanged()
    assert structure.is_unchanged


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_looked_at_as_well() -> None:
    net = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    structure = ModelStructure(net, optimizer, list(net.parameters()))
    assert structure.is_unchanged
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert not structure.is_unchanged


def test_what_is_added_is_seen_at_once() -> None:
    net, _, structure = _net()
    net[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert "parameter 0.scale did not exist" in _refusal(structure)
    net, _, structure = _net()
    net.append(nn.Linear(3, 3))
    assert "parameter 3.weight did not exist" in _refusal(structure)
