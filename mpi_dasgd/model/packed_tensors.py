"""Named tensors in one vector of bytes, with their dtypes and shapes, for snapshots and files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["PackedTensor", "pack", "unpack"]

_ALIGNMENT = 16  # bytes: the largest element, a complex number in double precision


class PackedTensor(NamedTuple):
    """Tensor as bytes.

    Attributes:
        dtype: torch's name of its dtype, as ``torch.float32``.
        shape: its shape.
        data: its elements in row-major order, (bytes,), uint8.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def kind(self) -> str:
        """Dtype and shape, for messages and comparisons."""
        return f"{self.dtype} {self.shape}"


def pack(tensors: Mapping[str, PackedTensor]) -> np.ndarray:
    """Return all of `tensors` as one vector, (bytes,), uint8; no tensors give an empty one.

    It begins with the length of a header, 8 bytes, little-endian. The header is JSON: name, dtype,
    shape, offset behind the header, and bytes of each tensor.
    """
    if not tensors:
        return np.empty(0, np.uint8)
    rows, offset = [], 0
    for name, tensor in tensors.items():
        rows.append((name, tensor.dtype, tensor.shape, offset, tensor.data.size))
        offset += _aligned(tensor.data.size)
    header = json.dumps(rows).encode()
    start = _aligned(8 + len(header))
    packed = np.zeros(start + offset, np.uint8)
    packed[:8].view("<u8")[0] = len(header)
    packed[8 : 8 + len(header)] = np.frombuffer(header, np.uint8)
    for row, tensor in zip(rows, tensors.values(), strict=True):
        packed[start + row[3] :][: row[4]] = tensor.data
    return packed


def unpack(packed: np.ndarray) -> dict[str, PackedTensor]:
    """Return the tensors that `pack` has packed, by name; their data are views."""
    if not packed.size:
        return {}
    length = int(packed[:8].view("<u8")[0])
    start = _aligned(8 + length)
    return {
        name: PackedTensor(dtype, tuple(shape), packed[start + offset :][:size])
        for name, dtype, shape, offset, size in json.loads(packed[8 : 8 + length].tobytes())
    }


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
