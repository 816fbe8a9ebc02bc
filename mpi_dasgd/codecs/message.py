"""Messages: contiguous buffers of header, trailer words, scales, checksums and payload.

All offsets are multiples of 64 bytes, so that every part is aligned for vector loads wherever the
buffer is. Sizes and counts are 64-bit: a message may exceed 2 GiB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mpi_dasgd.errors import MpiDasgdError

__all__ = ["Header", "Layout", "Message"]

MAGIC = 0x4D504453  # "MPDS"
VERSION = 1
ALIGNMENT = 64
_HEADER = struct.Struct("<IHHi4xqqqqQ")
_STAMP = struct.Struct("<IHHi4xqqqq")  # the header without its seed
_SEED = struct.Struct("<Q")
_SEED_AT = _STAMP.size
_SEQUENCE = struct.Struct("<q")
_SEQUENCE_AT = 56


class Header(NamedTuple):
    """First 64 bytes of a message, little endian.

    Attributes:
        magic, version: identify the format; a reader refuses others.
        codec: number of the codec; codecs that cannot read each other's messages have different
            ones.
        rank: rank of the sender.
        step: local step of the sender.
        time_ns: wall-clock (or virtual) time at the sender, in nanoseconds.
        elements: number of model elements, padding included.
        nbytes: length of the whole message in bytes.
        seed: seed of this message, which determines the codec's random numbers and checksums.
    """

    magic: int
    version: int
    codec: int
    rank: int
    step: int
    time_ns: int
    elements: int
    nbytes: int
    seed: int


@dataclass(frozen=True)
class Layout:
    """Layout of all messages of a codec for one model.

    Attributes:
        codec: number of the codec.
        elements: number of model elements.
        scales: number of float32 scales.
        checksums: number of uint32 checksums.
        trailer_words: number of 64-bit words that an algorithm writes beside the payload.
        payload_dtype: dtype of the payload.
        payload_items: number of payload items.
    """

    codec: int
    elements: int
    payload_dtype: np.dtype
    payload_items: int
    scales: int = 0
    checksums: int = 0
    trailer_words: int = 0

    @property
    def scales_at(self) -> int:
        """Offset of the scales in bytes; the trailer words are stored before them."""
        return ALIGNMENT + _aligned(8 * self.trailer_words)

    @property
    def checksums_at(self) -> int:
        """Offset of the checksums in bytes."""
        return self.scales_at + _aligned(4 * self.scales)

    @cached_property
    def payload_at(self) -> int:
        """Offset of the payload in bytes."""
        return self.checksums_at + _aligned(4 * self.checksums)

    @cached_property
    def nbytes(self) -> int:
        """Length of a message in bytes, a multiple of 64."""
        return self.payload_at + _aligned(self.payload_dtype.itemsize * self.payload_items)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Message:
    """Views of one message in a buffer owned by others: a slot of a window, or a staging buffer.

    Args:
        buffer: 1-D uint8 array of `layout.nbytes` bytes.
        layout: layout of the message.

    Attributes:
        buffer: the whole message.
        trailer, scales, checksums, payload: 1-D views of its parts: int64, float32, uint32, and the
            type of the codec.
        view: object that a codec keeps with this memory from call to call.
    """

    __slots__ = ("_raw", "buffer", "checksums", "layout", "payload", "scales", "trailer", "view")

    def __init__(self, buffer: np.ndarray, layout: Layout) -> None:
        if buffer.dtype != np.uint8 or buffer.shape != (layout.nbytes,):
            raise MpiDasgdError(
                f"message buffer: expected {layout.nbytes} bytes, got {buffer.dtype} {buffer.shape}"
            )
        self.buffer = buffer
        self.layout = layout
        self.view: Any = None
        self._raw = memoryview(buffer)
        self.trailer = buffer[ALIGNMENT:][: 8 * layout.trailer_words].view(np.int64)
        self.scales = buffer[layout.scales_at :][: 4 * layout.scales].view(np.float32)
        self.checksums = buffer[layout.checksums_at :][: 4 * layout.checksums].view(np.uint32)
        size = layout.payload_dtype.itemsize * layout.payload_items
        self.payload = buffer[layout.payload_at :][:size].view(layout.payload_dtype)

    def stamp(self, *, rank: int, step: int, time_ns: int) -> None:
        """Write the header, except for the seed, which the codec writes."""
        layout = self.layout
        _STAMP.pack_into(
            self._raw, 0, MAGIC, VERSION, layout.codec, rank, step, time_ns,
            layout.elements, layout.nbytes,
        )  # fmt: skip

    @property
    def seed(self) -> int:
        """Seed of this message, an unsigned 64-bit integer."""
        return int(_SEED.unpack_from(self._raw, _SEED_AT)[0])

    @seed.setter
    def seed(self, value: int) -> None:
        _SEED.pack_into(self._raw, _SEED_AT, value)

    @property
    def header(self) -> Header:
        """The header, validated.

        Raises:
            MpiDasgdError: the message has another format, version, codec or model size.
        """
        header = Header._make(_HEADER.unpack_from(self._raw, 0))
        expected = (MAGIC, VERSION, self.layout.codec, self.layout.elements, self.layout.nbytes)
        found = (header.magic, header.version, header.codec, header.elements, header.nbytes)
        if found != expected:
            raise MpiDasgdError(
                f"message header: expected (magic, version, codec, elements, bytes) {expected}, "
                f"got {found}"
            )
        return header

    @property
    def sequence(self) -> int:
        """Number of this message among those of its sender to this receiver."""
        return int(_SEQUENCE.unpack_from(self._raw, _SEQUENCE_AT)[0])

    @sequence.setter
    def sequence(self, value: int) -> None:
        _SEQUENCE.pack_into(self._raw, _SEQUENCE_AT, value)
