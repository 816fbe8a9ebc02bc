"""The codecs `none`, `bf16` and `fp16` on a GPU: the whole exchange in one pass over memory.

Models and messages have the bits of the codecs on the host. The distance is summed in another
order.
"""

from __future__ import annotations

import math

import numpy as np

from mpi_dasgd.codecs.base import Codec, ExchangeBuffers, ExchangeOutcome, Outcome
from mpi_dasgd.codecs.elementwise import BFloat16Codec, Float16Codec
from mpi_dasgd.codecs.late_totals import LateTotals
from mpi_dasgd.codecs.message import Message
from mpi_dasgd.codecs.none import NoCodec
from mpi_dasgd.device.base import Array, Device
from mpi_dasgd.kernels.cuda.pair_average import pair_average

__all__ = ["CODECS"]


class _DevicePairAverage(Codec):
    """What these codecs share: the exchange, by a kernel.

    Args:
        elements: number of model elements.
        dtype: type of the model: float32.
        device: device of the models and of the messages' bodies.
    """

    def __init__(self, elements: int, dtype: np.dtype, device: Device) -> None:
        super().__init__(elements, dtype)  # type: ignore[call-arg]  # that of the host
        self._totals = LateTotals(device, 1)

    def average_pair(self, x: Array, buffers: ExchangeBuffers) -> Outcome:
        """Do the whole exchange in one pass over memory; see `Codec.average_pair`."""
        partner_model = buffers.partner_model
        for message in (*buffers.deltas, partner_model):
            if message is not None:
                _ = message.header  # raises if the message has another codec or size
        is_measured = partner_model is not None and self.name != "none"
        pair_average(
            x,
            [message.payload for message in buffers.deltas],
            _payload(partner_model),
            buffers.weight,
            _payload(buffers.reply_delta),
            _payload(buffers.publication),
            self._totals.reserve() if is_measured else None,
            buffers.update,
        )
        return self._totals.add(_distance) if is_measured else ExchangeOutcome()

    def encode(self, x: Array, out: Message) -> None:  # that of `NoCodec` is of the host
        """Write the model `x`, shape (elements,), to `out`."""
        self.average_pair(x, ExchangeBuffers(publication=out))

    def settle(self) -> None:
        """Wait for all exchanges; see `Codec.settle`."""
        self._totals.settle()


class _DeviceNoCodec(_DevicePairAverage, NoCodec):
    """`NoCodec` on a GPU."""


class _DeviceBFloat16Codec(_DevicePairAverage, BFloat16Codec):
    """`BFloat16Codec` on a GPU."""


class _DeviceFloat16Codec(_DevicePairAverage, Float16Codec):
    """`Float16Codec` on a GPU."""


def _payload(message: Message | None) -> Array | None:
    return None if message is None else message.payload


def _distance(square: np.ndarray) -> ExchangeOutcome:
    return ExchangeOutcome(math.sqrt(square[0]))


CODECS: dict[str, type[_DevicePairAverage]] = {
    "none": _DeviceNoCodec,
    "bf16": _DeviceBFloat16Codec,
    "fp16": _DeviceFloat16Codec,
}
"""The codecs by name; each takes the number of elements, the type of the models and the device."""
