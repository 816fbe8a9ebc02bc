"""The codecs `lattice4`, `lattice8`, `lattice16`, whose error follows the models' distance.

A publication holds lattice codes of the model. A delta holds the integers by which both sides move,
so that the sum of the models is conserved to the rounding of one addition per element, whatever the
codes, the scales, or the buckets that could not be decoded. `mpi_dasgd.kernels.lattice` has the
arithmetic.
"""

from __future__ import annotations

import ctypes
import math
from abc import abstractmethod
from collections.abc import Mapping

import numpy as np

from mpi_dasgd.codecs.base import Codec, ExchangeBuffers, ExchangeOutcome, Seeds, require_float32
from mpi_dasgd.codecs.bucket_scale import AdaptiveScale
from mpi_dasgd.codecs.message import Layout, Message
from mpi_dasgd.codecs.native_state import BucketCounts, PairCodecStruct, pair_codec_struct
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.device.base import Array
from mpi_dasgd.kernels import lattice, optimizer
from mpi_dasgd.kernels.encoded import (
    BUCKET,
    BUCKET_STATS,
    EncodedVector,
    FusedStep,
    buckets_of,
    code_dtype,
    codes_of,
)

__all__ = ["LatticeCodec", "LatticeMessages"]

# Codec numbers in the header: 16 + bits, and 64 more if rounded to nearest.
_NUMBER, _NEAREST = 16, 64


class LatticeMessages(Codec):
    """Messages in lattice codes of 4, 8 or 16 bits, with scales and checksums of the buckets.

    Args:
        elements: number of model elements.
        dtype: type of the model: float32.
        bits: bits per code.
        settings: section ``codec`` of the configuration.
        seeds: generator of the messages' seeds.

    Raises:
        UserError: the models are not float32.
    """

    def __init__(
        self, elements: int, dtype: np.dtype, bits: int, settings: CodecConfig, seeds: Seeds
    ) -> None:
        self.name = f"lattice{bits}"
        require_float32(self.name, dtype)
        buckets = buckets_of(elements)
        self._bits = bits
        self._nearest = settings.rounding == "nearest"
        self.layout = Layout(
            codec=_NUMBER + bits + _NEAREST * self._nearest,
            elements=elements,
            payload_dtype=code_dtype(bits),
            payload_items=codes_of(elements, bits),
            scales=buckets,
            checksums=buckets,
        )
        self.counters = self._counts = BucketCounts()
        self._threads = settings.thread_count
        self._seeds = seeds
        self._stats = self._new_stats()
        self._delta_stats: list[Array] = []

    @abstractmethod
    def _new_stats(self) -> Array:
        """Return room for the statistics of a message, `BUCKET_STATS`, shape (buckets,)."""

    def _step(self, x: Array, buffers: ExchangeBuffers) -> FusedStep:
        """Return an exchange as one pass over memory, without the scales of the publication."""
        step = FusedStep(x, self._threads)
        step.optimizer = buffers.update
        step.deltas = tuple(map(self._received, buffers.deltas))
        step.delta_stats = self._stats_of_deltas(len(buffers.deltas))
        step.weight = buffers.weight
        if buffers.partner_model is not None:
            step.partner_model, step.stats = self._received(buffers.partner_model), self._stats
            if buffers.reply_delta is not None:
                step.reply_delta = self._new(buffers.reply_delta)
        if buffers.publication is not None:
            step.publication = self._new(buffers.publication)
        return step

    def _view(self, message: Message) -> EncodedVector:
        view: EncodedVector | None = message.view
        if view is None:
            view = message.view = EncodedVector(
                self.layout.elements,
                self._bits,
                message.payload,
                message.scales,
                message.checksums,
                nearest=self._nearest,
            )
        return view

    def _received(self, message: Message) -> EncodedVector:
        view = self._view(message)
        view.seed = message.header.seed
        return view

    def _new(self, message: Message) -> EncodedVector:
        view = self._view(message)
        view.seed = message.seed = self._seeds.draw()
        return view

    def _stats_of_deltas(self, count: int) -> tuple[Array, ...]:
        while len(self._delta_stats) < count:
            self._delta_stats.append(self._new_stats())
        return tuple(self._delta_stats[:count])


class LatticeCodec(LatticeMessages):
    """Lattice codes of 4, 8 or 16 bits, with a scale and a checksum per bucket of 1,024 elements.

    Args, raises: see `LatticeMessages`.
    """

    def __init__(
        self, elements: int, dtype: np.dtype, bits: int, settings: CodecConfig, seeds: Seeds
    ) -> None:
        super().__init__(elements, dtype, bits, settings, seeds)
        self.scale = AdaptiveScale(
            elements, bits, BUCKET, settings.scale_margin, settings.scale_decay
        )

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> ExchangeOutcome:
        """Do the whole exchange in one pass over memory; see `Codec.average_pair`."""
        step = self._step(x, buffers)
        if buffers.publication is not None:
            if buffers.update is not None and self.scale.measures_next:
                optimizer.run(buffers.update, x, self._threads)  # what is measured is behind it
                step.optimizer = None
            self.scale.scales(x, buffers.publication.scales)
        lattice.backend_of(x).run(step)
        for message, stats in zip(buffers.deltas, step.delta_stats, strict=True):
            self._observe_delta(message, stats, buffers.weight)
        if buffers.partner_model is None:
            return ExchangeOutcome()
        return self._observe(buffers.partner_model)

    def native_state(self) -> PairCodecStruct | None:
        """Return bits, seeds, scale and counters; see `Codec.native_state`."""
        if type(self) is not LatticeCodec:
            return None
        return pair_codec_struct(
            self.layout,
            bits=self._bits,
            nearest=self._nearest,
            threads=self._threads,
            seeds=ctypes.addressof(self._seeds.struct),
            scale=ctypes.addressof(self.scale.struct),
            counts=ctypes.addressof(self._counts.struct),
        )

    def _new_stats(self) -> np.ndarray:
        return np.zeros(self.layout.scales, BUCKET_STATS)

    def _observe(self, publication: Message) -> ExchangeOutcome:
        """Update scale and counters after an exchange that this rank initiated."""
        stats, scales = self._stats, publication.scales
        rejected, count = stats["rejected"], 0
        if rejected.any():
            count = int(rejected.sum())
            scales = np.where(
                rejected, np.float32(0), scales
            )  # that of a rejected bucket is arbitrary
        self.counters["buckets_decoded"] += rejected.size - count
        self.counters["buckets_rejected"] += count
        largest = np.sqrt(stats["max_d2"], dtype=np.float32)
        largest *= scales
        self.scale.observe(largest, rejected != 0 if count else None, publication.scales)
        squares = np.square(scales, dtype=np.float64) * stats["sum_d2"]
        # One after the other, as the native exchange sums them.
        total = np.add.accumulate(squares)[-1] if squares.size else 0.0
        return ExchangeOutcome(math.sqrt(total), count)

    def _observe_delta(self, message: Message, stats: np.ndarray, weight: float) -> None:
        """Update the scale after a received delta.

        Its unit in a bucket is -weight * scale, or 0 if the partner rejected the bucket.
        """
        units, corrupt = message.scales, stats["rejected"]
        if corrupt.any():
            self.counters["buckets_corrupt"] += int(corrupt.sum())
            units = np.where(corrupt, np.float32(0), units)
        distance = np.sqrt(stats["max_d2"], dtype=np.float32)
        distance *= np.abs(units)  # so that no zero is negative: scale_math.h has the same bits
        distance *= np.float32(1 / weight)
        self.scale.observe(distance, None if units.all() else units == 0)

    def delta(self, message: Message) -> np.ndarray:
        """Return a delta as numbers, float32, shape (elements,)."""
        numbers = np.zeros(self.layout.elements, np.float32)
        lattice.apply(numbers, self._received(message))
        return numbers

    def state(self) -> dict[str, np.ndarray]:
        """Return the estimated distances, and the number of seeds drawn so far."""
        return {"estimate": self.scale.estimate, "messages": np.array([self._seeds.drawn])}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned."""
        self.scale.estimate[:] = arrays["estimate"]
        self._seeds.drawn = int(arrays["messages"][0])
