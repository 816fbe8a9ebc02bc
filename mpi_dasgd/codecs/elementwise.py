"""Baseline codecs whose error does not follow the models' distance: `bf16`, `fp16` and `qsgd8`.

Their error follows the size of the models, so that it exceeds the distance between models that are
close to each other. The delta is quantized, too, and both sides move by the quantized one: the sum
of the models is conserved as with the other codecs. They are plain NumPy, in cache-sized blocks.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from mpi_dasgd.codecs.base import (
    Codec,
    ExchangeBuffers,
    ExchangeOutcome,
    Outcome,
    Seeds,
    require_float32,
)
from mpi_dasgd.codecs.message import Layout, Message
from mpi_dasgd.kernels.encoded import BUCKET, CACHE_BLOCK
from mpi_dasgd.kernels.optimizer import run_part

__all__ = ["BFloat16Codec", "ElementwiseCodec", "Float16Codec", "QsgdCodec"]


class ElementwiseCodec(Codec):
    """Base of codecs that encode each block by `pack`, decode it by `unpack`, average in float32.

    Args:
        elements: number of model elements.
        dtype: type of the model: float32.
        layout: layout of all messages.

    Raises:
        UserError: the models are not float32.
    """

    def __init__(self, elements: int, dtype: np.dtype, layout: Layout) -> None:
        require_float32(self.name, dtype)
        self.layout = layout
        self.counters = {}

    @abstractmethod
    def pack(self, x: np.ndarray, out: Message, start: int) -> None:
        """Write a block of a vector, which begins at element `start`, to `out`.

        Args:
            x: block, float32, 1-D.
            out: message that receives it.
            start: index of the first element of the block.
        """

    @abstractmethod
    def unpack(self, message: Message, start: int, count: int) -> np.ndarray:
        """Return `count` elements of a message from `start` on, a new float32 array."""

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> Outcome:
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
            if buffers.update is not None:
                run_part(buffers.update, v, start)
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
        """Return a delta as numbers, float32, shape (elements,)."""
        return self.unpack(message, 0, self.layout.elements)


class BFloat16Codec(ElementwiseCodec):
    """Upper 16 bits of float32, rounded to nearest, ties to even."""

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
    """IEEE half precision, rounded to nearest; beyond 65,504 it saturates."""

    name = "fp16"

    def __init__(self, elements: int, dtype: np.dtype) -> None:
        items = np.dtype(np.float16)
        super().__init__(elements, dtype, Layout(2, elements, items, elements))

    def pack(self, x: np.ndarray, out: Message, start: int) -> None:
        np.clip(x, -65504, 65504, out=out.payload[start : start + x.size], casting="same_kind")

    def unpack(self, message: Message, start: int, count: int) -> np.ndarray:
        return message.payload[start : start + count].astype(np.float32)


class QsgdCodec(ElementwiseCodec):
    """255 even steps between the extremes of a bucket of 1,024, with unbiased random rounding.

    This is QSGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132) in the form that frameworks use,
    with the minimum and the maximum of a bucket. ``scales`` holds the minima, then the steps.
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
        values.reshape(-1)[x.size :] = x[-1:]  # the extremes of the bucket do not change
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
