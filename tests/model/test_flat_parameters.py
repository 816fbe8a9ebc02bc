"""A module as one flat vector: views, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import BUCKET
from mpi_dasgd.model.flat_parameters import FlatParameters
from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def test_parameters_are_views_of_the_vector() -> None:
    model = _model()
    before = [p.detach().clone() for p in model.parameters()]
    flat = FlatParameters(model)
    assert flat.size == sum(p.numel() for p in before)
    assert flat.host_view.size % BUCKET == 0 and not flat.host_view[flat.size :].any()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    flat.host_view[:] = 1
    assert all((p == 1).all() for p in model.parameters())


def test_the_optimizer_moves_the_vector() -> None:
    model = _model()
    flat = FlatParameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = flat.host_view.copy()
    model(torch.randn(4, 3)).sum().backward()
    gradient = flat.gather_gradient().clone()
    optimizer.step()
    np.testing.assert_allclose(
        flat.host_view, before - 0.1 * gradient.numpy(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gathered_gradients_are_those_of_every_step(set_to_none: bool) -> None:
    model = _model()
    flat = FlatParameters(model)
    for _ in range(3):
        model.zero_grad(set_to_none=set_to_none)
        model(torch.randn(4, 3)).square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        expected = torch.cat([gradient.reshape(-1).clone() for gradient in gradients])
        assert torch.equal(flat.gather_gradient()[: flat.size], expected)


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    model = _model()
    flat = FlatParameters(model)
    flat.gather_gradient().fill_(7)
    model.zero_grad()
    assert not flat.gather_gradient()[: flat.size].any()


def test_the_digest_sees_the_vector() -> None:
    flat = FlatParameters(_model())
    digest = flat.digest()
    flat.host_view[0] += 1
    assert flat.digest() != digest


def test_what_cannot_be_flattened_is_refused() -> None:
    with pytest.raises(UserError, match="no trainable parameters"):
        FlatParameters(nn.ReLU())
    with pytest.raises(UserError, match=r"parameter weight is not initialized"):
        FlatParameters(nn.LazyLinear(2))


def test_the_vector_is_float64_if_a_parameter_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double())
    flat = FlatParameters(model)
    assert flat.dtype == flat.host_view.dtype == np.float64
    assert flat.names == ["1.weight", "1.bias", "0.weight", "0.bias"]
    flat.set(np.full(flat.host_view.size, 1 / 3))
    assert (model[1].weight == 1 / 3).all() and (model[0].weight == np.float32(1 / 3)).all()


def test_elements_of_the_vector_have_names() -> None:
    flat = FlatParameters(_model())
    assert [flat.name_of(index) for index in (0, 14, 15, flat.size)] == [
        "0.weight", "0.weight", "0.bias", "padding",
    ]  # fmt: skip
    assert flat.description()[1] == ("0.bias", (5,), "float32", (1,), 15)


@pytest.mark.mpi
def test_ranks_with_the_same_data_make_the_plain_loop_bit_for_bit() -> None:
    run_pooled(2, ROOT / "tests" / "programs" / "plain_loops.py")
