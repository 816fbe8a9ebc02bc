"""Where each parameter is in the flat vector: segments of memory, and placements within them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.model.flat_memory import byte_range, group_overlapping

__all__ = ["Placement", "Segment", "describe", "lay_out", "name_at", "vector_type"]


@dataclass(frozen=True, eq=False)
class Placement:
    """One parameter in its segment.

    Attributes:
        name: name of the parameter.
        parameter: the parameter.
        shape: its shape.
        stride: its strides within the segment, in elements of its own type.
        offset: its first element in the segment, in elements of its own type.
        is_complex: whether an element is a pair of reals.
    """

    name: str
    parameter: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_complex: bool

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return what `flat`, the real numbers of the segment, has in the place of the parameter.

        Args:
            flat: (elements of the segment,), any real type.
        """
        if self.is_complex:
            flat = torch.view_as_complex(flat.view(-1, 2))
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


@dataclass(eq=False)
class Segment:
    """A piece of memory that belongs to one parameter, or to several that share it.

    Attributes:
        start: its first element in the vector.
        host_start: its first element in the vector of host memory, where nothing is aligned.
        elements: number of its real numbers.
        dtype: real type of its parameters.
        placements: its parameters.
    """

    start: int
    elements: int
    dtype: torch.dtype
    placements: list[Placement] = field(default_factory=list)
    host_start: int = 0

    @property
    def part(self) -> slice:
        """Its elements of the vector."""
        return slice(self.start, self.start + self.elements)

    @property
    def host_part(self) -> slice:
        """Its elements of the vector of host memory."""
        return slice(self.host_start, self.host_start + self.elements)


def vector_type(parameters: Sequence[torch.Tensor]) -> np.dtype:
    """Return the type of the vector that holds `parameters`: float64 or float32."""
    is_double = any(p.dtype.to_real() == torch.float64 for p in parameters)
    return np.dtype(np.float64 if is_double else np.float32)


def lay_out(
    named: Sequence[tuple[str, torch.Tensor]], alignment: int = 1
) -> tuple[torch.dtype, list[Segment]]:
    """Return the type of the vector, and its segments in their order.

    The order is that of `named`, except that parameters of the vector's own type come first, and
    complex ones before real ones of the same type. Parameters keep their strides where these leave
    no holes, and those that share memory share a segment.

    Args:
        named: name and parameter.
        alignment: bytes that the address of each segment is a multiple of: without it, on a GPU,
            optimizers and convolutions take slower ways.

    Raises:
        UserError: parameters of different types share memory.
    """
    tensors = [p for _, p in named]
    types = list(dict.fromkeys(p.dtype.to_real() for p in tensors))
    real_type = torch.float64 if vector_type(tensors) == np.float64 else torch.float32
    segments = [
        _shared([named[index] for index in group]) if len(group) > 1 else _own(*named[group[0]])
        for group in group_overlapping(tensors)
    ]
    segments.sort(key=lambda segment: _order(segment, real_type, types))
    start = host_start = 0
    for segment in segments:
        pair = 1 if _is_real(segment) else 2
        segment.start = _round_up(start, max(pair, alignment // segment.dtype.itemsize))
        segment.host_start = _round_up(host_start, pair)
        start, host_start = segment.part.stop, segment.host_part.stop
    return real_type, segments


def describe(
    segments: Sequence[Segment],
) -> list[tuple[str, tuple[int, ...], str, tuple[int, ...], int]]:
    """Return name, shape, dtype, strides and first element in the vector of each parameter."""
    return [
        (
            placement.name,
            tuple(placement.shape),
            str(placement.parameter.dtype).removeprefix("torch."),
            placement.stride,
            segment.start + placement.offset * (1 + placement.is_complex),
        )
        for segment in segments
        for placement in segment.placements
    ]


def name_at(segments: Sequence[Segment], index: int) -> str:
    """Return the name of the parameter that has element `index` of the vector of host memory."""
    for segment in segments:
        if segment.host_start <= index < segment.host_part.stop:
            return " = ".join(placement.name for placement in segment.placements)
    return "padding"


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _order(
    segment: Segment, real_type: torch.dtype, types: Sequence[torch.dtype]
) -> tuple[bool, int, bool]:
    return segment.dtype != real_type, types.index(segment.dtype), _is_real(segment)


def _is_real(segment: Segment) -> bool:
    return not any(placement.is_complex for placement in segment.placements)


def _own(name: str, p: torch.Tensor) -> Segment:
    """Return the segment of a parameter that shares its memory with no other one."""
    stride = torch.empty_like(p, device="meta").stride()  # those of `p`, without holes
    placement = Placement(name, p, p.shape, stride, 0, p.is_complex())
    return Segment(0, p.numel() * (1 + p.is_complex()), p.dtype.to_real(), [placement])


def _shared(named: Sequence[tuple[str, torch.Tensor]]) -> Segment:
    """Return the segment of parameters that overlap."""
    ranges = [byte_range(p) for _, p in named]
    begin, end = min(start for start, _ in ranges), max(stop for _, stop in ranges)
    dtype = named[0][1].dtype.to_real()
    segment = Segment(0, (end - begin) // dtype.itemsize, dtype)
    for (name, p), (start, _) in zip(named, ranges, strict=True):
        offset, rest = divmod(start - begin, p.itemsize)
        if p.dtype.to_real() != dtype or rest or segment.elements % (1 + p.is_complex()):
            raise UserError(
                f"model: parameters {named[0][0]} and {name} share memory, but are "
                f"{named[0][1].dtype} and {p.dtype}; expected one type for both"
            )
        segment.placements.append(Placement(name, p, p.shape, p.stride(), offset, p.is_complex()))
    return segment
