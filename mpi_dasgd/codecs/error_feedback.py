"""Updates: increments of a model on the wire, exact on a grid, with error feedback.

All numbers are multiples of `GRID_STEP` = 2^-40. While they stay below `EXACT_RANGE` = 2^12,
float64 adds and subtracts them without rounding, so that the order in which updates are added does
not matter: replicas that have added the same updates are equal bit for bit. An update loses at most
half a `GRID_STEP` once, at its source.

What a rank still owes another is one vector. A message carries the part Q(owed) that the codec can
say, and exactly that part is subtracted: owed <- owed - Q(owed). What is left goes with later
messages (error feedback). Updates that found no room meanwhile are simply more that is owed.

- `none`: the type of the model. A sum may need more bits than float32 has; the rest stays owed.
- `bf16`: the upper half of float32.
- `qsgd8`: codes -127 .. 127 times a unit for each bucket of 1,024, rounded to the nearest: 0 stays
  0. The unit is a multiple of `GRID_STEP`; it is in the first half of the message's scales, the
  second is not used. The rest is at most 1/254 of the largest that was owed, and 0 once that is
  below 127 `GRID_STEP`: some five messages say all.

Codes relative to a reference (`lattice*`) have no place here: an update is no model near another
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
EXACT_RANGE = 2.0**12
_LARGEST = 127


def round_to_grid(values: np.ndarray) -> np.ndarray:
    """Round float64 `values` to the nearest multiples of `GRID_STEP`, in place; return them."""
    values *= 1 / GRID_STEP
    np.rint(values, out=values)
    values *= GRID_STEP
    return values


def blocks(elements: int) -> Iterator[slice]:
    """Yield the parts of a vector that are dealt with at a time."""
    for start in range(0, elements, CACHE_BLOCK):
        yield slice(start, min(start + CACHE_BLOCK, elements))


class UpdateQuantizer(ABC):
    """Writes what is owed to messages, and reads it."""

    def pack(self, residual: np.ndarray, out: Message) -> bool:
        """Write Q(owed) to `out` and subtract it from `owed`; return whether anything is left.

        Args:
            residual: (elements,), float64, on the grid; changed in place.
            out: receives the payload; its header and notes are left alone.
        """
        left = False
        for part in blocks(residual.size):
            block = residual[part]
            self._write(block, out, part)
            block -= self.read(out, part)
            left = bool(block.any()) or left
        return left

    @abstractmethod
    def read(self, message: Message, part: slice) -> np.ndarray:
        """Return a part of an update, exactly on the grid; of some type that float64 holds."""

    @abstractmethod
    def _write(self, owed: np.ndarray, out: Message, part: slice) -> None:
        """Write Q(owed) of a part."""


class _Plain(UpdateQuantizer):
    """The type of the model: float32 (a rounded multiple of the grid is one) or float64."""

    def read(self, message: Message, part: slice) -> np.ndarray:
        return message.payload[part]

    def _write(self, owed: np.ndarray, out: Message, part: slice) -> None:
        out.payload[part] = owed


class _BFloat16(UpdateQuantizer):
    def __init__(self, codec: BFloat16Codec) -> None:
        self._codec = codec

    def read(self, message: Message, part: slice) -> np.ndarray:
        return self._codec.unpack(message, part.start, part.stop - part.start)

    def _write(self, owed: np.ndarray, out: Message, part: slice) -> None:
        self._codec.pack(owed.astype(np.float32), out, part.start)


class _Buckets(UpdateQuantizer):
    """8-bit codes times a unit for each bucket."""

    def read(self, message: Message, part: slice) -> np.ndarray:
        first, last = part.start // BUCKET, -(-part.stop // BUCKET)
        codes = message.payload[first * BUCKET : last * BUCKET].view(np.int8)
        values = codes.reshape(-1, BUCKET) * message.scales[first:last, None].astype(np.float64)
        return values.reshape(-1)[: part.stop - part.start]

    def _write(self, owed: np.ndarray, out: Message, part: slice) -> None:
        first, last = part.start // BUCKET, -(-part.stop // BUCKET)
        values = np.zeros((last - first, BUCKET))
        values.reshape(-1)[: owed.size] = owed
        largest = np.abs(values).max(1)
        # 24 bits of a multiple of the grid are one again, whether rounded up or down
        unit = (np.ceil(largest / (_LARGEST * GRID_STEP)) * GRID_STEP).astype(np.float32)
        values /= np.where(unit > 0, unit, 1).astype(np.float64)[:, None]
        codes = np.rint(values, out=values).astype(np.int8)
        out.payload[first * BUCKET : last * BUCKET] = codes.reshape(-1).view(np.uint8)
        out.scales[first:last] = unit


def update_quantizer(codec: Codec) -> UpdateQuantizer:
    """Return how updates are written to messages with the layout of `codec`: none, bf16 or qsgd8."""
    if isinstance(codec, BFloat16Codec):
        return _BFloat16(codec)
    if isinstance(codec, QsgdCodec):
        return _Buckets()
    assert codec.name == "none", "`Algorithm.codec_settings` refuses others"
    return _Plain()
