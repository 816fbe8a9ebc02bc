"""Messages: buffers of header, trailer words, scales, checksums and payload.

Header and trailer are the envelope, which the host reads and writes; the rest is the body. Both are
one contiguous buffer, or the body is elsewhere, in the memory of a GPU. All offsets are multiples
of 64 bytes, so that every part is aligned for vector loads wherever the buffer is. Sizes and counts
are 64-bit: a message may exceed 2 GiB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mpi_dasgd.device.base import Array
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

    @property
    def envelope_nbytes(self) -> int:
        """Length of header and trailer in bytes, a multiple of 64: where the body begins."""
        return self.scales_at

    @property
    def body_nbytes(self) -> int:
        """Length of scales, checksums and payload in bytes, a multiple of 64."""
        return self.nbytes - self.scales_at


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Message:
    """Views of one message in memory owned by others: a slot of a window, or a staging buffer.

    Args:
        buffer: the whole message, 1-D uint8 array of `layout.nbytes` bytes in host memory; with
            `body`, its first `layout.envelope_nbytes` bytes only.
        layout: layout of the message.
        body: the rest, 1-D uint8 array (NumPy or CuPy) of `layout.body_nbytes` bytes, if it is not
            in `buffer`.

    Raises:
        MpiDasgdError: an array has another shape or dtype.

    Attributes:
        layout: as above.
        trailer: int64, in host memory.
        scales, checksums, payload: 1-D views of the body: float32, uint32, and the type of the
            codec.
        view: object that a codec keeps with this memory from call to call.
    """

    __slots__ = (
        "_body", "_buffer", "_raw", "checksums", "layout", "payload", "scales", "trailer", "view",
    )  # fmt: skip

    def __init__(self, buffer: np.ndarray, layout: Layout, body: Array | None = None) -> None:
        size = layout.nbytes if body is None else layout.envelope_nbytes
        if buffer.dtype != np.uint8 or buffer.shape != (size,):
            raise MpiDasgdError(
                f"message buffer: expected {size} bytes, got {buffer.dtype} {buffer.shape}"
            )
        self._buffer = buffer
        self._body = body
        self.layout = layout
        self.view: Any = None
        self._raw = memoryview(buffer)
        self.trailer = buffer[ALIGNMENT:][: 8 * layout.trailer_words].view(np.int64)
        if body is None:
            body, start = buffer, 0
        else:
            start = layout.scales_at
            if body.dtype != np.uint8 or body.shape != (layout.body_nbytes,):
                raise MpiDasgdError(
                    f"message body: expected {layout.body_nbytes} bytes, got {body.dtype} "
                    f"{body.shape}"
                )
        self.scales = body[layout.scales_at - start :][: 4 * layout.scales].view(np.float32)
        self.checksums = body[layout.checksums_at - start :][: 4 * layout.checksums].view(np.uint32)
        size = layout.payload_dtype.itemsize * layout.payload_items
        self.payload = body[layout.payload_at - start :][:size].view(layout.payload_dtype)

    @property
    def buffer(self) -> np.ndarray:
        """The whole message, uint8, (layout.nbytes,).

        Raises:
            MpiDasgdError: the body is elsewhere.
        """
        if self._body is not None:
            raise MpiDasgdError("message buffer: the body is in other memory than the envelope")
        return self._buffer

    @property
    def envelope(self) -> np.ndarray:
        """Header and trailer, uint8, (layout.envelope_nbytes,), in host memory."""
        return self._buffer[: self.layout.envelope_nbytes]

    @property
    def body(self) -> Array:
        """Scales, checksums and payload, uint8, (layout.body_nbytes,)."""
        return self._buffer[self.layout.scales_at :] if self._body is None else self._body

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
