"""The gradient as one vector: other types, frozen parameters, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.gradient_vector import GradientVector, require_exchangeable_gradients
from mpi_dasgd.model.parameter_layout import Segment, lay_out


def _layout(module: nn.Module) -> tuple[list[Segment], GradientVector]:
    dtype, segments = lay_out(list(module.named_parameters()))
    return segments, GradientVector(segments, torch.zeros(segments[-1].part.stop, dtype=dtype))


def test_gradients_of_other_types_are_copied_there_and_back() -> None:
    module = nn.ParameterList(
        [torch.ones(2).bfloat16(), torch.ones(2), torch.ones(1, dtype=torch.complex64)]
    )
    low, real, pair = module
    _, gradient = _layout(module)
    (low.sum().float() + 2 * real.sum() + (3j * pair).imag.sum()).backward()
    vector = gradient.gather()
    assert vector.tolist() == [3, 0, 2, 2, 1, 1]
    vector *= 2
    gradient.scatter()
    assert low.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert [p.grad.tolist() for p in module] == [[2, 2], [4, 4], [6]]  # type: ignore[union-attr]


def test_frozen_parameters_get_no_gradient() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).bfloat16())
    module[0].bias.requires_grad_(False)
    module[1].bias.requires_grad_(False)
    _, gradient = _layout(module)
    gradient.gather().fill_(1)
    gradient.scatter()
    assert module[0].weight.grad is not None and module[1].weight.grad is not None
    assert module[0].bias.grad is None and module[1].bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_no_rank_has_used_is_left_without_a_gradient(dtype: torch.dtype) -> None:
    """The sum over two ranks, of which the other has a gradient of `used_there` alone."""
    module = nn.ParameterDict(
        {name: torch.ones(2, dtype=dtype) for name in ("unused", "used_here", "used_there")}
    )
    _, gradient = _layout(module)
    for _ in range(2):
        module.zero_grad()
        (module["used_here"] * -0.0).sum().backward()  # its gradient is all -0
        own = gradient.gather().clone()
        module.zero_grad()
        module["used_there"].sum().backward()
        vector = gradient.gather()
        vector += own
        vector /= 2
        gradient.scatter()
        assert module["unused"].grad is None
        assert module["used_here"].grad.tolist() == [0, 0]  # type: ignore[union-attr]
        assert module["used_there"].grad.tolist() == [0.5, 0.5]  # type: ignore[union-attr]


def test_sparse_gradients_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))
    segments, gradient = _layout(module)
    with pytest.raises(UserError, match=r"'allreduce' exchanges gradients.*0\.weight are sparse"):
        require_exchangeable_gradients(module, segments, "allreduce")
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match=r"gradient of parameter 0\.weight is sparse"):
        gradient.gather()


def test_a_refusal_leaves_all_gradients_as_they_are() -> None:
    module = nn.ModuleList([nn.Linear(2, 1), nn.Embedding(4, 2, sparse=True)])
    _, gradient = _layout(module)
    gradient.gather().fill_(7)
    module.zero_grad()
    (module[0](torch.ones(2)) + module[1](torch.tensor(1)).sum()).backward()
    with pytest.raises(UserError, match="is sparse"):
        gradient.gather()
    assert module[0].weight.grad.tolist() == [[1, 1]]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_with_a_history_are_gathered() -> None:
    module = nn.Linear(2, 1)
    _, gradient = _layout(module)
    (module(torch.ones(2)) ** 2 / 2).backward(create_graph=True)
    output = module(torch.ones(2)).item()
    assert gradient.gather().tolist() == pytest.approx([output] * 3)
    assert not gradient.gather().requires_grad


def test_gradients_that_have_changed_places_are_copied_before_any_is_cleared() -> None:
    module = nn.ParameterList([torch.ones(2), torch.ones(2)])
    _, gradient = _layout(module)
    for first, second in [(0, 1), (1, 0)]:
        module.zero_grad()
        (3 * module[first]).sum().backward()
        gradient.gather()
        module[second].grad, module[first].grad = module[first].grad, None
        gradient.gather()
        assert module[second].grad.tolist() == [3, 3]
        assert module[first].grad.tolist() == [0, 0]


def test_parameters_that_share_memory_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight.data = module[0].weight.data
    segments, _ = _layout(module)
    with pytest.raises(UserError, match=r"0\.weight and 1\.weight share memory"):
        require_exchangeable_gradients(module, segments, "asgd")
    module[1].weight = module[0].weight  # one parameter has one gradient
    require_exchangeable_gradients(module, _layout(module)[0], "asgd")
