"""The codec `none`: models and deltas cross the wire unchanged."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.codecs.base import Codec, ExchangeBuffers, ExchangeOutcome, Outcome
from mpi_dasgd.codecs.message import Layout, Message
from mpi_dasgd.codecs.native_state import PairCodecStruct, pair_codec_struct
from mpi_dasgd.kernels.pair_average import pair_average

__all__ = ["NoCodec"]


class NoCodec(Codec):
    """Codec that sends the elements themselves.

    Args:
        elements: number of model elements.
        dtype: type of the model: float32, or float64 in the simulator.
        threads: threads that share a float32 model on the host.
    """

    name = "none"

    def __init__(self, elements: int, dtype: np.dtype, threads: int = 1) -> None:
        self.layout = Layout(
            codec=0, elements=elements, payload_dtype=dtype, payload_items=elements
        )
        self.counters = {}
        self._threads = threads

    def encode(self, x: np.ndarray, out: Message) -> None:
        """Copy the model `x` to `out`."""
        pair_average(x, publication=out.payload, threads=self._threads)

    def average_pair(self, x: np.ndarray, buffers: ExchangeBuffers) -> Outcome:
        """Do the whole exchange in one pass over memory; see `Codec.average_pair`."""
        partner_model, reply_delta = buffers.partner_model, buffers.reply_delta
        publication = buffers.publication
        pair_average(
            x,
            [message.payload for message in buffers.deltas],
            None if partner_model is None else partner_model.payload,
            buffers.weight,
            None if reply_delta is None else reply_delta.payload,
            None if publication is None else publication.payload,
            buffers.update,
            self._threads,
        )
        return ExchangeOutcome()

    def native_state(self) -> PairCodecStruct | None:
        """Return layout and threads, for float32 models; see `Codec.native_state`."""
        if type(self) is not NoCodec or self.layout.payload_dtype != np.float32:
            return None
        return pair_codec_struct(self.layout, threads=self._threads)

    def delta(self, message: Message) -> np.ndarray:
        """Return the payload."""
        return message.payload
