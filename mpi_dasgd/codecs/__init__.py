"""Codecs: how a model or a delta becomes a message and how a partner uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mpi_dasgd.codecs.base import Codec, ExchangeBuffers, ExchangeOutcome, Seeds
from mpi_dasgd.codecs.elementwise import BFloat16Codec, Float16Codec, QsgdCodec
from mpi_dasgd.codecs.lattice import LatticeCodec
from mpi_dasgd.codecs.message import Header, Layout, Message
from mpi_dasgd.codecs.none import NoCodec
from mpi_dasgd.config.schema import CodecConfig as Settings
from mpi_dasgd.errors import UserError, nearest

__all__ = [
    "CODECS",
    "Codec",
    "ExchangeBuffers",
    "ExchangeOutcome",
    "Header",
    "Layout",
    "Message",
    "NoCodec",
    "Settings",
    "make",
]


CODECS: dict[str, Callable[[int, np.dtype, Settings, Seeds], Codec]] = {
    "none": lambda n, dtype, settings, seeds: NoCodec(n, dtype),
    "bf16": lambda n, dtype, settings, seeds: BFloat16Codec(n, dtype),
    "fp16": lambda n, dtype, settings, seeds: Float16Codec(n, dtype),
    "lattice4": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 4, settings, seeds),
    "lattice8": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 8, settings, seeds),
    "lattice16": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 16, settings, seeds),
    "qsgd8": lambda n, dtype, settings, seeds: QsgdCodec(n, dtype, seeds),
}


def make(
    settings: Settings,
    elements: int,
    dtype: np.dtype,
    *,
    seed: int,
    rank: int,
    trailer_words: int = 0,
) -> Codec:
    """Make a rank's codec for models of `elements` elements of `dtype`.

    Args:
        settings: section ``codec`` of the configuration.
        elements, dtype: of the model.
        seed: of the run.
        rank: whose codec.
        trailer_words: 64-bit words that the algorithm adds to each message.

    Raises:
        UserError: for an unknown name, or models that the codec does not take.
    """
    name = settings.name
    if name not in CODECS:
        raise UserError(
            f"codec {name!r} is not known{nearest(name, CODECS)} (valid: {', '.join(CODECS)})"
        )
    codec = CODECS[name](elements, dtype, settings, Seeds(seed, rank))
    if trailer_words:
        codec.layout = dataclasses.replace(codec.layout, trailer_words=trailer_words)
    return codec
