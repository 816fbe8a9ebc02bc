"""Codecs: how a model or a delta becomes a message and how a partner uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mpi_dasgd.codecs.message import Header, Layout, Message
from mpi_dasgd.codecs.none import NoCodec
from mpi_dasgd.errors import UserError, nearest

__all__ = ["CODECS", "Codec", "Header", "Layout", "Message", "NoCodec", "make"]


class Codec(Protocol):
    """What algorithms need of a codec."""

    name: str
    layout: Layout

    def encode(self, x: np.ndarray, out: Message) -> None:
        """Write model `x`, 1-D, to `out`."""

    def exchange(
        self,
        x: np.ndarray,
        arrived: Sequence[Message],
        theirs: Message | None,
        weight: float,
        reply: Message | None,
        published: Message | None,
    ) -> None:
        """Absorb, average and publish; see `mpi_dasgd.kernels.average.pair_average`."""


CODECS: dict[str, type[NoCodec]] = {"none": NoCodec}


def make(name: str, elements: int, dtype: np.dtype) -> Codec:
    """Make a codec for models of `elements` elements of `dtype`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in CODECS:
        raise UserError(
            f"codec {name!r} is not known{nearest(name, CODECS)} (valid: {', '.join(CODECS)})"
        )
    return CODECS[name](elements, dtype)
