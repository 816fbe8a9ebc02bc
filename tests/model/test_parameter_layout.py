"""Segments of the flat vector: order, strides, and memory that parameters share."""

from __future__ import annotations

import pytest
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.parameter_layout import lay_out


def _places(*tensors: torch.Tensor) -> list[tuple[str, int, int]]:
    """Return name, start of the segment and offset in it of each parameter, in order."""
    _, segments = lay_out([(chr(97 + i), t) for i, t in enumerate(tensors)])
    return [(p.name, s.start, p.offset) for s in segments for p in s.placements]


def test_parameters_of_one_type_are_in_the_order_of_the_module() -> None:
    parameters = [torch.zeros(2, 3), torch.zeros(0), torch.tensor(1.0), torch.zeros(4)]
    assert _places(*parameters) == [("a", 0, 0), ("b", 6, 0), ("c", 6, 0), ("d", 7, 0)]


def test_types_of_the_vector_come_first_and_complex_ones_before_real_ones() -> None:
    low, real, pair = torch.zeros(3).half(), torch.zeros(3), torch.zeros(2, dtype=torch.complex64)
    assert lay_out([("a", low)])[0] == torch.float32
    assert _places(low, real, pair) == [("c", 0, 0), ("b", 4, 0), ("a", 7, 0)]
    double = torch.zeros(1, dtype=torch.float64)
    dtype, segments = lay_out([("a", pair), ("b", real), ("c", double)])
    assert dtype == torch.float64
    assert [s.start for s in segments] == [0, 2, 6]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(3, 4).t(),
        torch.zeros(6, 6)[::2, 1:3],
        torch.zeros(4).expand(3, 4),
    ],
    ids=["channels_last", "transposed", "part of a tensor", "expanded"],
)
def test_strides_are_kept_without_holes(tensor: torch.Tensor) -> None:
    _, (segment,) = lay_out([("a", tensor)])
    (placement,) = segment.placements
    assert segment.elements == tensor.numel()
    view = placement.view(torch.arange(float(tensor.numel())))
    assert view.shape == tensor.shape and len(view.unique()) == tensor.numel()
    if tensor.is_contiguous() or tensor.numel() == tensor.untyped_storage().nbytes() // 4:
        assert view.stride() == tensor.stride()


def test_parameters_that_share_memory_share_a_segment() -> None:
    a = torch.zeros(3, 4)
    assert _places(a, torch.zeros(1), a.t()) == [("a", 0, 0), ("c", 0, 0), ("b", 12, 0)]
    assert _places(a, a[1]) == [("a", 0, 0), ("b", 0, 4)]
    assert _places(a[0], a[1:]) == [("a", 0, 0), ("b", 4, 0)]  # side by side
    pair = torch.zeros(2, dtype=torch.complex64)
    assert _places(pair, torch.view_as_real(pair)[1]) == [("a", 0, 0), ("b", 0, 2)]


def test_memory_of_two_types_is_refused() -> None:
    a = torch.zeros(4)
    with pytest.raises(UserError, match=r"a and b share memory, but are .*float32 and .*bfloat16"):
        lay_out([("a", a), ("b", a.view(torch.bfloat16))])
