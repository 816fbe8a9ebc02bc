"""Messages: where their parts lie, and which headers are refused."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import MpiDasgdError

LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)


def staging() -> Message:
    return Message(np.zeros(LAYOUT.nbytes, np.uint8), LAYOUT)


LAYOUTS = [
    Layout(
        codec=0, elements=n, payload_dtype=np.dtype(dtype), payload_items=n, scales=s, checksums=c
    )
    for n in (1, 16, 1000)
    for dtype in ("f4", "f8", "u1")
    for s, c in ((0, 0), (1, 1), (17, 33))
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_of_a_message_are_aligned_and_apart(layout: Layout) -> None:
    offsets = [0, layout.scales_at, layout.checksums_at, layout.payload_at, layout.nbytes]
    assert offsets == sorted(offsets) and all(offset % 64 == 0 for offset in offsets)
    message = Message(np.zeros(layout.nbytes, np.uint8), layout)
    message.stamp(rank=3, step=5, time_ns=7)
    message.sequence = 11
    message.scales[:] = 1.5
    message.checksums[:] = 99
    message.payload[:] = 42
    assert message.header.rank == 3 and message.sequence == 11
    assert (message.scales == 1.5).all() and (message.checksums == 99).all()
    sizes = message.scales.size, message.checksums.size, message.payload.size
    assert sizes == (layout.scales, layout.checksums, layout.payload_items)
    assert (message.payload == 42).all() and message.payload.dtype == layout.payload_dtype


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("trailer_words", [0, 9])
def test_a_body_elsewhere_has_the_same_bytes(layout: Layout, trailer_words: int) -> None:
    layout = dataclasses.replace(layout, trailer_words=trailer_words)
    whole = Message(np.zeros(layout.nbytes, np.uint8), layout)
    envelope, body = (
        np.zeros(size, np.uint8) for size in (layout.envelope_nbytes, layout.body_nbytes)
    )
    assert envelope.size == 64 + 64 * -(-8 * trailer_words // 64)
    apart = Message(envelope, layout, body=body)
    for message in (whole, apart):
        message.stamp(rank=3, step=5, time_ns=7)
        message.sequence, message.seed = 11, 2**63
        message.trailer[:] = np.arange(trailer_words)
        message.scales[:] = 1 + np.arange(layout.scales)
        message.checksums[:] = 2 + np.arange(layout.checksums)
        message.payload[:] = 42
        assert message.envelope.shape == (layout.envelope_nbytes,)
        assert message.body.shape == (layout.body_nbytes,)
        assert message.trailer.shape == (trailer_words,)
    assert apart.header == whole.header and apart.sequence == 11
    assert np.array_equal(apart.envelope, whole.envelope)
    assert np.array_equal(apart.body, whole.body)
    assert np.array_equal(np.concatenate([envelope, body]), whole.buffer)
    assert apart.body is body and np.shares_memory(whole.body, whole.buffer)
    with pytest.raises(MpiDasgdError, match="the body is in other memory"):
        _ = apart.buffer


def test_an_envelope_or_a_body_of_the_wrong_size_or_type_is_refused() -> None:
    envelope, body = (
        np.zeros(size, np.uint8) for size in (LAYOUT.envelope_nbytes, LAYOUT.body_nbytes)
    )
    for wrong in (np.zeros(LAYOUT.nbytes, np.uint8), envelope[1:], envelope.view(np.int8)):
        with pytest.raises(MpiDasgdError, match="message buffer: expected 64 bytes"):
            Message(wrong, LAYOUT, body=body)
    for wrong in (np.zeros(LAYOUT.nbytes, np.uint8), body[:-1], body.view(np.int8), body[None]):
        with pytest.raises(MpiDasgdError, match=f"message body: expected {body.size} bytes"):
            Message(envelope, LAYOUT, body=wrong)


def test_sizes_beyond_2_gib() -> None:
    n = 3_000_000_001
    layout = Layout(
        codec=0,
        elements=n,
        payload_dtype=np.dtype("f4"),
        payload_items=n,
        scales=n // 64,
        checksums=7,
    )
    assert layout.nbytes >= 4 * n + 4 * (n // 64) + 4 * 7 + 64
    assert layout.nbytes - (4 * n + 4 * (n // 64) + 4 * 7 + 64) < 3 * 64
    assert layout.nbytes % 64 == 0 and layout.payload_at > 2**27


def test_a_buffer_of_the_wrong_size_or_type_is_refused() -> None:
    for buffer in (
        np.zeros(LAYOUT.nbytes - 1, np.uint8),
        np.zeros(LAYOUT.nbytes + 64, np.uint8),
        np.zeros(LAYOUT.nbytes, np.int8),
        np.zeros((1, LAYOUT.nbytes), np.uint8),
    ):
        with pytest.raises(MpiDasgdError, match=f"expected {LAYOUT.nbytes} bytes"):
            Message(buffer, LAYOUT)


def test_header_is_64_bytes_little_endian_with_the_sequence_last() -> None:
    message = staging()
    message.stamp(rank=1_000_000, step=2**40, time_ns=-5)
    message.sequence = 2**50
    message.seed = 2**64 - 2
    message.stamp(rank=7, step=2**41, time_ns=2**62)
    assert message.sequence == 2**50, "a stamp leaves the sequence alone"
    assert message.seed == 2**64 - 2, "and the seed"
    assert not message.payload.any()
    header = message.header
    assert (header.rank, header.step, header.time_ns) == (7, 2**41, 2**62)
    assert (header.elements, header.nbytes, header.seed) == (8, LAYOUT.nbytes, 2**64 - 2)
    fields = struct.unpack("<IHHi4xqqqqQ", message.buffer[:56].tobytes())
    assert fields == tuple(header)
    assert struct.unpack("<q", message.buffer[56:64].tobytes()) == (2**50,)


@pytest.mark.parametrize("offset", [0, 3, 4, 6, 32, 40], ids=str)
def test_a_foreign_header_is_refused(offset: int) -> None:
    """At these bytes: magic (2), version, codec, elements, length."""
    message = staging()
    with pytest.raises(MpiDasgdError, match="message header: expected"):
        _ = message.header  # a slot that was never written
    message.stamp(rank=0, step=0, time_ns=0)
    assert message.header.rank == 0
    message.buffer[offset] ^= 1
    with pytest.raises(MpiDasgdError, match="message header: expected"):
        _ = message.header


def test_a_message_of_another_model_is_refused() -> None:
    other = Layout(codec=0, elements=9, payload_dtype=np.dtype("f4"), payload_items=9)
    assert other.nbytes == LAYOUT.nbytes
    message = staging()
    Message(message.buffer, other).stamp(rank=0, step=0, time_ns=0)
    with pytest.raises(MpiDasgdError, match="got .*9"):
        _ = message.header
