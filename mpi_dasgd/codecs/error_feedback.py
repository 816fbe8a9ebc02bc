"""Error feedback: increments of a model on the wire, exact on a grid, with their residuals.

All numbers are multiples of `GRID_STEP` = 2^-40. While they stay below `EXACT_RANGE` = 2^12,
float64 adds and subtracts them without rounding, so that the order in which updates are added does
not matter: replicas that have added the same updates are equal bit for bit. An update loses at most
half a `GRID_STEP` once, at its source.

What a rank has not yet sent to another one is a vector, the residual. A message carries the part
Q(residual) that the codec can represent, and exactly that part is subtracted: residual <- residual
- Q(residual). The remainder is sent with later messages (error feedback). Updates that found a full
inbox meanwhile are simply added to the residual.

- `none`: the type of the model. A sum may need more bits than float32 has; the remainder stays in
  the residual.
- `bf16`: the upper half of float32.
- `qsgd8`: codes -127 .. 127 times a unit for each bucket of 1,024, rounded to nearest: 0 stays 0.
  The unit is a multiple of `GRID_STEP`; it is stored in the first half of the message's scales, the
  second half is not used. Each message leaves a residual of at most 1/254 of the largest entry, and
  none below 127 `GRID_STEP`; about five messages transmit an update exactly.

Codes relative to a reference (`lattice*`) cannot be used: an update is not a model close to another
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from mpi_dasgd.codecs.base import Codec
from mpi_dasgd.codecs.elementwise import BFloat16Codec, QsgdCodec
from mpi_dasgd.codecs.message import Message
from mpi_dasgd.kernels.encoded import BUCKET, CACHE_BLOCK

__all__ = [
    "EXACT_RANGE",
    "GRID_STEP",
    "UpdateQuantizer",
    "blocks",
    "round_to_grid",
    "update_quantizer",
]

GRID_STEP = 2.0**-40
"""Spacing of the grid."""

EXACT_RANGE = 2.0**12
"""Absolute value below which additions on the grid are exact."""

_LARGEST_CODE = 127


def round_to_grid(values: np.ndarray) -> np.ndarray:
    """Round float64 `values` to the nearest multiples of `GRID_STEP`, in place; return them."""
    values *= 1 / GRID_STEP
    np.rint(values, out=values)
    values *= GRID_STEP
    return values


def blocks(elements: int) -> Iterator[slice]:
    """Yield the parts of a vector of `elements` elements that are processed one after the other."""
    for start in range(0, elements, CACHE_BLOCK):
        yield slice(start, min(start + CACHE_BLOCK, elements))


class UpdateQuantizer(ABC):
    """Writes residuals to messages, and reads updates from them."""

    def pack(self, residual: np.ndarray, out: Message) -> bool:
        """Write Q(residual) to `out`, subtract it, and return whether anything remains.

        Args:
            residual: shape (elements,), float64, on the grid; changed in place.
            out: message whose payload and scales are written; header and trailer are not.
        """
        remains = False
        for part in blocks(residual.size):
            block = residual[part]
            self._write(block, out, part)
            block -= self.read(out, part)
            remains = bool(block.any()) or remains
        return remains

    @abstractmethod
    def read(self, message: Message, part: slice) -> np.ndarray:
        """Return a part of an update, exactly on the grid, in a type that float64 contains."""

    @abstractmethod
    def _write(self, residual: np.ndarray, out: Message, part: slice) -> None:
        """Write Q(residual) of a part."""


class _Plain(UpdateQuantizer):
    """Type of the model: float64, or float32, where a rounded multiple of the grid is one again."""

    def read(self, message: Message, part: slice) -> np.ndarray:
        return message.payload[part]

    def _write(self, residual: np.ndarray, out: Message, part: slice) -> None:
        out.payload[part] = residual


class _BFloat16(UpdateQuantizer):
    def __init__(self, codec: BFloat16Codec) -> None:
        self._codec = codec

    def read(self, message: Message, part: slice) -> np.ndarray:
        return self._codec.unpack(message, part.start, part.stop - part.start)

    def _write(self, residual: np.ndarray, out: Message, part: slice) -> None:
        self._codec.pack(residual.astype(np.float32), out, part.start)


class _Buckets(UpdateQuantizer):
    """8-bit codes times a unit per bucket."""

    def read(self, message: Message, part: slice) -> np.ndarray:
        first, last = part.start // BUCKET, -(-part.stop // BUCKET)
        codes = message.payload[first * BUCKET : last * BUCKET].view(np.int8)
        values = codes.reshape(-1, BUCKET) * message.scales[first:last, None].astype(np.float64)
        return values.reshape(-1)[: part.stop - part.start]

    def _write(self, residual: np.ndarray, out: Message, part: slice) -> None:
        first, last = part.start // BUCKET, -(-part.stop // BUCKET)
        values = np.zeros((last - first, BUCKET))
        values.reshape(-1)[: residual.size] = residual
        largest = np.abs(values).max(1)
        # rounding a multiple of the grid to 24 bits, up or down, gives a multiple of the grid
        unit = (np.ceil(largest / (_LARGEST_CODE * GRID_STEP)) * GRID_STEP).astype(np.float32)
        values /= np.where(unit > 0, unit, 1).astype(np.float64)[:, None]
        codes = np.rint(values, out=values).astype(np.int8)
        out.payload[first * BUCKET : last * BUCKET] = codes.reshape(-1).view(np.uint8)
        out.scales[first:last] = unit


def update_quantizer(codec: Codec) -> UpdateQuantizer:
    """Return the quantizer of updates for messages of `codec`: none, bf16 or qsgd8."""
    if isinstance(codec, BFloat16Codec):
        return _BFloat16(codec)
    if isinstance(codec, QsgdCodec):
        return _Buckets()
    assert codec.name == "none", "`Algorithm.resolve_codec` refuses others"
    return _Plain()
