"""The vector in host memory, of a model that is exchanged on a device."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mpi_dasgd.model.flat_parameters import FlatParameters
from tests.support.late_device import LateDevice


def _model() -> nn.Module:
    """A model whose parameters have 3 to 9 elements, in three types."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16(), nn.Linear(3, 1))
    model.register_parameter("phase", nn.Parameter(torch.randn(5, dtype=torch.complex64)))
    model.register_parameter("image", nn.Parameter(torch.randn(1, 3, 2, 2)))
    model.image.data = model.image.data.to(memory_format=torch.channels_last)
    return model


def _on_device(model: nn.Module) -> FlatParameters:
    return FlatParameters(model, device=LateDevice((0, 0)))


def test_parameters_on_a_device_are_aligned_and_keep_values_and_strides() -> None:
    model, plain = _model(), _model()
    flat = _on_device(model)
    assert all(p.data_ptr() % 16 == 0 for p in model.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype and p.stride() == q.stride()
    host = FlatParameters(plain)
    assert flat.size == host.size and flat.names == host.names
    assert not np.array_equal(flat.vector, host.vector)  # there are gaps
    flat.copy_to_host()
    np.testing.assert_array_equal(flat.host_view, host.host_view)
    assert flat.digest() == host.digest()
    assert [flat.name_of(i) for i in range(flat.size + 1)] == [
        host.name_of(i) for i in range(host.size + 1)
    ]


def test_host_memory_has_a_copy_only_when_it_is_used() -> None:
    flat = _on_device(_model())
    assert flat._mirror._copy is None
    before = flat.to_host(flat.vector)
    assert flat._mirror._copy is None
    flat.copy_to_host()
    np.testing.assert_array_equal(flat.host_view, before)
    flat.vector += 1
    np.testing.assert_array_equal(flat.host_view, before)  # it is another memory
    flat.scatter()
    flat.copy_to_host()
    assert (flat.host_view[: flat.size] != before[: flat.size]).all()


def test_what_is_set_in_host_memory_is_there_on_the_device() -> None:
    model, plain = _model(), _model()
    flat, host = _on_device(model), FlatParameters(plain)
    vector = np.random.default_rng(1).normal(size=host.host_view.size)
    vector[host.size :] = 0
    flat.set(vector)
    host.set(vector)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    other = flat.to_device(host.host_view)
    parts = [segment.part for segment in flat._segments]
    assert all((other[part] == flat.vector[part]).all() for part in parts)
    np.testing.assert_array_equal(flat.to_host(other), host.host_view)


def test_a_model_without_odd_parameters_has_no_gaps() -> None:
    flat = _on_device(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)))
    assert flat.to_host(flat.vector).shape == flat.vector.shape
    np.testing.assert_array_equal(flat.to_host(flat.vector), flat.vector)
