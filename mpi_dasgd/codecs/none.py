"""The codec `none`: models and deltas cross the wire as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mpi_dasgd.codecs.base import ExchangeOutcome
from mpi_dasgd.codecs.message import Layout, Message
from mpi_dasgd.kernels.pair_average import pair_average

__all__ = ["NoCodec"]


class NoCodec:
    """Sends elements unchanged.

    Args:
        elements: number of model elements.
        dtype: float32, or float64 for the simulator.
    """

    name = "none"

    def __init__(self, elements: int, dtype: np.dtype) -> None:
        self.layout = Layout(
            codec=0, elements=elements, payload_dtype=dtype, payload_items=elements
        )
        self.counters: dict[str, int] = {}

    def encode(self, x: np.ndarray, out: Message) -> None:
        """Write model `x` to `out`."""
        pair_average(x, publication=out.payload)

    def average_pair(
        self,
        x: np.ndarray,
        deltas: Sequence[Message],
        partner_model: Message | None,
        weight: float,
        reply_delta: Message | None,
        publication: Message | None,
    ) -> ExchangeOutcome:
        """Do all of an exchange in one pass; see `mpi_dasgd.codecs.base.Codec`."""
        pair_average(
            x,
            [message.payload for message in deltas],
            None if partner_model is None else partner_model.payload,
            weight,
            None if reply_delta is None else reply_delta.payload,
            None if publication is None else publication.payload,
        )
        return ExchangeOutcome()

    def delta(self, message: Message) -> np.ndarray:
        """Return the payload."""
        return message.payload

    def state(self) -> dict[str, np.ndarray]:
        """Return nothing: there is none."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back nothing."""
