"""The codecs `lattice4`, `lattice8`, `lattice16` on a GPU.

Models, messages, estimates and counters have the bits of the codec on the host; the distance is
summed in another order. No array goes to the host in an exchange, and the host waits for nothing:
what was rejected, and the distance, are known when the GPU has done the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mpi_dasgd.codecs.base import ExchangeBuffers, ExchangeOutcome, Outcome, Seeds
from mpi_dasgd.codecs.device_scale import DeviceScale
from mpi_dasgd.codecs.late_totals import LateTotals
from mpi_dasgd.codecs.lattice import LatticeMessages
from mpi_dasgd.codecs.message import Message
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.device.base import Array, Device
from mpi_dasgd.kernels import cuda
from mpi_dasgd.kernels.cuda.optimizer import begin
from mpi_dasgd.kernels.cuda.scale import TOTALS
from mpi_dasgd.kernels.encoded import BUCKET_STATS, FusedStep

__all__ = ["DeviceLatticeCodec"]


class DeviceLatticeCodec(LatticeMessages):
    """`LatticeCodec` on a GPU.

    Args:
        elements, dtype, bits, settings, seeds: see `LatticeMessages`.
        device: device of the models and of the messages' bodies.

    Raises:
        UserError: the models are not float32.

    Attributes:
        scale: scales of its messages.
    """

    def __init__(
        self,
        elements: int,
        dtype: np.dtype,
        bits: int,
        settings: CodecConfig,
        seeds: Seeds,
        device: Device,
    ) -> None:
        self._device = device
        super().__init__(elements, dtype, bits, settings, seeds)
        self.scale = DeviceScale(
            self.layout.scales, bits, settings.scale_margin, settings.scale_decay
        )
        self._totals = LateTotals(device, TOTALS)

    def average_pair(self, x: Array, buffers: ExchangeBuffers) -> Outcome:
        """Ask for the whole exchange, in one pass over memory; see `Codec.average_pair`."""
        step = self._step(x, buffers)
        if buffers.publication is not None:
            if buffers.update is not None and self.scale.measures_next:
                begin(buffers.update, x, alone=True)  # what is measured is behind it
                step.optimizer = None
            self.scale.scales(x, buffers.publication.scales)
        cuda.run(step)
        if buffers.partner_model is None and not buffers.deltas:
            return ExchangeOutcome()
        self.scale.observe(step, self._totals.reserve())
        return self._totals.add(
            self._count_deltas if buffers.partner_model is None else self._count_exchange
        )

    def _new_stats(self) -> Array:
        size = self.layout.scales * BUCKET_STATS.itemsize
        return self._device.xp.zeros(size, np.uint8).view(BUCKET_STATS)

    def _count_deltas(self, totals: np.ndarray) -> ExchangeOutcome:
        """Count the buckets of deltas, and return the outcome of absorbing them."""
        self.counters["buckets_corrupt"] += int(totals[1])
        return ExchangeOutcome()

    def _count_exchange(self, totals: np.ndarray) -> ExchangeOutcome:
        """Count the buckets of an exchange that this rank initiated, and return its outcome."""
        rejected, square = int(totals[0]), float(totals[2])
        self._count_deltas(totals)
        self.counters["buckets_decoded"] += self.layout.scales - rejected
        self.counters["buckets_rejected"] += rejected
        return ExchangeOutcome(math.sqrt(square), rejected)

    def settle(self) -> None:
        """Wait until `counters` hold all exchanges so far; see `Codec.settle`."""
        self._totals.settle()

    def delta(self, message: Message) -> Array:
        """Return a delta as numbers, float32, shape (elements,), on the device."""
        numbers = self._device.xp.zeros(self.layout.elements, np.float32)
        step = FusedStep(numbers)
        step.deltas = (self._received(message),)
        cuda.run(step)
        return numbers

    def state(self) -> dict[str, np.ndarray]:
        """Return what `LatticeCodec.state` does; waits for the device."""
        estimate = self._device.to_host(self.scale.estimate)
        return {"estimate": estimate, "messages": np.array([self._seeds.drawn])}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restore what `state` returned."""
        self._device.assign(self.scale.estimate, arrays["estimate"])
        self._seeds.drawn = int(arrays["messages"][0])
