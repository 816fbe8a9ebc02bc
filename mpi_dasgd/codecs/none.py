"""The codec `none`: models and deltas cross the wire as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mpi_dasgd.codecs.base import Outcome
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

    def exchange(
        self,
        x: np.ndarray,
        arrived: Sequence[Message],
        theirs: Message | None,
        weight: float,
        reply: Message | None,
        published: Message | None,
    ) -> Outcome:
        """Do all of an exchange in one pass; see `mpi_dasgd.codecs.base.Codec`."""
        pair_average(
            x,
            [message.payload for message in arrived],
            None if theirs is None else theirs.payload,
            weight,
            None if reply is None else reply.payload,
            None if published is None else published.payload,
        )
        return Outcome()

    def delta(self, message: Message) -> np.ndarray:
        """Return the payload."""
        return message.payload

    def state(self) -> dict[str, np.ndarray]:
        """Return nothing: there is none."""
        return {}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take back nothing."""
