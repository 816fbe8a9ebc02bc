"""Baselines that quantize without regard to the distance: `bf16`, `fp16` and `qsgd8`.

Their error follows the size of the models, so that it exceeds the distance between models that are near
each other. The delta is quantized, too, and both sides move by the quantized one: the sum of the models
is conserved as with the other codecs. They are plain NumPy, in cache-sized blocks.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from mpi_dasgd.codecs.base import Codec, ExchangeBuffers, ExchangeOutcome, Seeds, require_float32
from mpi_dasgd.codecs.message import Layout, Message
from mpi_dasgd.kernels.encoded import BUCKET, CACHE_BLOCK

__all__ = ["BFloat16Codec", "ElementwiseCodec", "Float16Codec", "QsgdCodec"]


class ElementwiseCodec(Codec):
    """Averages in float32 what `pack` and `unpack` make of a block.

    Args:
        elements: number of model elements.
        dtype: float32.

    Raises:
        UserError: the models are not float32.
    """

    def __init__(self, elements: int, dtype: np.dtype, layout: Layout) -> None:
        require_float32(self.name, dtype)
        self.layout = layout
        self.counters = {}

    @abstractmethod
    def pack(self, x: np.ndarray, out: Message, start: int) -> None:
        """Write a block of a vector, from element `start` on, to `out`."""

    @abstractmethod
    def unpack(self, message: Message, start: int, count: int) -> np.ndarray:
        """Return `count` elements of a message as a new float32 array."""

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> ExchangeOutcome:
        """Do the whole exchange, block by block; see `Codec.average_pair`."""
        deltas, partner_model, reply_delta = (
            buffers.deltas,
            buffers.partner_model,
            buffers.reply_delta,
        )
        for message in (*deltas, partner_model):
            if message is not None:
                _ = message.header  # raises if the message has another codec or size
        square = 0.0
        for start in range(0, x.size, CACHE_BLOCK):
            v = x[start : start + CACHE_BLOCK]
            for delta in deltas:
                v += self.unpack(delta, start, v.size)
            if partner_model is not None:
                d = self.unpack(partner_model, start, v.size)
                d -= v
                square += float(np.dot(d, d))
                d *= np.float32(-buffers.weight)
                if reply_delta is not None:
                    self.pack(d, reply_delta, start)
                    d = self.unpack(reply_delta, start, v.size)
                v -= d
            if buffers.publication is not None:
                self.pack(v, buffers.publication, start)
        return ExchangeOutcome() if partner_model is None else ExchangeOutcome(square**0.5)

    def delta(self, message: Message) -> np.ndarray:
        """Return a delta as numbers."""
        return self.unpack(message, 0, self.layout.elements)


class BFloat16Codec(ElementwiseCodec):
    """The upper 16 bits of float32, rounded to the nearest, ties to even."""

    name = "bf16"

    def __init__(self, elements: int, dtype: np.dtype) -> None:
        items = np.dtype(np.uint16)
        super().__init__(elements, dtype, Layout(1, elements, items, elements))

    def pack(self, x: np.ndarray, out: Message, start: int) -> None:
        bits = x.view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        rounded = np.where(np.isnan(x), bits | np.uint32(0x400000), rounded)  # NaN stays NaN
        out.payload[start : start + x.size] = rounded >> np.uint32(16)

    def unpack(self, message: Message, start: int, count: int) -> np.ndarray:
        bits = message.payload[start : start + count].astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)


class Float16Codec(ElementwiseCodec):
    """IEEE half precision, rounded to the nearest; beyond 65,504 it saturates."""

    name = "fp16"

    def __init__(self, elements: int, dtype: np.dtype) -> None:
        items = np.dtype(np.float16)
        super().__init__(elements, dtype, Layout(2, elements, items, elements))

    def pack(self, x: np.ndarray, out: Message, start: int) -> None:
        np.clip(x, -65504, 65504, out=out.payload[start : start + x.size], casting="same_kind")

    def unpack(self, message: Message, start: int, count: int) -> np.ndarray:
        return message.payload[start : start + count].astype(np.float32)


class QsgdCodec(ElementwiseCodec):
    """255 even steps between the extremes of a bucket of 1,024, rounded at random without bias.

    As QSGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132) in the form with the minimum and the
    maximum of a bucket that frameworks use. ``scales`` holds the minima, then the steps.
    """

    name = "qsgd8"

    def __init__(self, elements: int, dtype: np.dtype, seeds: Seeds) -> None:
        buckets = -(-elements // BUCKET)
        items = np.dtype(np.uint8)
        layout = Layout(3, elements, items, buckets * BUCKET, scales=2 * buckets)
        super().__init__(elements, dtype, layout)
        self._buckets = buckets
        self._rng = np.random.Generator(np.random.SFC64(seeds.draw()))

    def pack(self, x: np.ndarray, out: Message, start: int) -> None:
        rows = -(-x.size // BUCKET)
        values = np.empty((rows, BUCKET), np.float32)
        values.reshape(-1)[: x.size] = x
        values.reshape(-1)[x.size :] = x[-1:]  # the extremes stay what they are
        least = values.min(1)
        step = (values.max(1) - least) / np.float32(255)
        first = start // BUCKET
        out.scales[first : first + rows] = least
        out.scales[self._buckets + first :][:rows] = step
        values -= least[:, None]
        values /= np.where(step > 0, step, np.float32(1))[:, None]
        values += self._rng.random(values.shape, np.float32)
        np.minimum(values, np.float32(255), out=values)
        out.payload[start : start + values.size] = values.reshape(-1).astype(np.uint8)

    def unpack(self, message: Message, start: int, count: int) -> np.ndarray:
        rows = -(-count // BUCKET)
        first = start // BUCKET
        codes = message.payload[start : start + rows * BUCKET].reshape(rows, BUCKET)
        values = codes.astype(np.float32)
        values *= message.scales[self._buckets + first :][:rows, None]
        values += message.scales[first : first + rows, None]
        return values.reshape(-1)[:count]
