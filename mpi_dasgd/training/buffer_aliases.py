"""Buffers that are views of parameters stay views of them when the parameters move."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpi_dasgd.errors import UserError

__all__ = ["BufferAliases"]


class _Alias(NamedTuple):
    """Buffer that lies in the memory of a parameter, as both were.

    Attributes:
        names: names of buffer and parameter.
        buffer, parameter: the two.
        address, stride: where the parameter was, and its strides.
        offset: elements from the beginning of the parameter to that of the buffer.
        is_inside: whether the buffer is a view of elements of the parameter, and no more.
    """

    names: tuple[str, str]
    buffer: torch.Tensor
    parameter: torch.nn.Parameter
    address: int
    stride: tuple[int, ...]
    offset: int
    is_inside: bool


class BufferAliases:
    """Buffers of a module that are views of its parameters, as it is at construction.

    Args:
        module: the module, before its parameters become views of a vector.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        parameters = [(n, p) for n, p in module.named_parameters() if _extent(p)]
        self._aliases = [
            alias
            for name, buffer in module.named_buffers()
            if _extent(buffer)
            if (alias := _find(name, buffer, parameters)) is not None
        ]

    def restore(self) -> None:
        """Make the buffers views of the parameters where these are now.

        Raises:
            UserError: a buffer is more than a view of a parameter that has moved.
        """
        for names, buffer, p, address, stride, offset, is_inside in self._aliases:
            if p.data_ptr() == address:
                continue
            if not is_inside or p.stride() != stride:
                raise UserError(
                    f"model: buffer {names[0]} shares memory with parameter {names[1]}, which is "
                    "about to become part of a vector, and would no longer do so: register a copy "
                    "of it (.clone()), or a view of that parameter alone"
                )
            place = p.storage_offset() + offset
            buffer.data = p.data.as_strided(buffer.shape, buffer.stride(), place)


def _find(
    name: str, buffer: torch.Tensor, parameters: list[tuple[str, torch.nn.Parameter]]
) -> _Alias | None:
    start, end = buffer.data_ptr(), buffer.data_ptr() + _extent(buffer)
    for other, p in parameters:
        first, last = p.data_ptr(), p.data_ptr() + _extent(p)
        if start < last and first < end and p is not buffer:
            is_inside = first <= start and end <= last and buffer.dtype == p.dtype
            is_inside &= _extent(p) == p.numel() * p.element_size()
            offset = (start - first) // p.element_size()
            return _Alias((name, other), buffer, p, first, p.stride(), offset, is_inside)
    return None


def _extent(tensor: torch.Tensor) -> int:
    """Return the bytes from the first to the last element; 0 for a tensor without such memory."""
    lazy = torch.nn.parameter.is_lazy(tensor)
    if lazy or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return 0
    steps = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return (steps + 1) * tensor.element_size()
