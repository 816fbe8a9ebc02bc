"""Codecs: the encoding of models and deltas as messages, and averages with decoded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mpi_dasgd.codecs.base import Codec, ExchangeBuffers, ExchangeOutcome, Outcome, Seeds
from mpi_dasgd.codecs.elementwise import BFloat16Codec, Float16Codec, QsgdCodec
from mpi_dasgd.codecs.lattice import LatticeCodec
from mpi_dasgd.codecs.message import Header, Layout, Message
from mpi_dasgd.codecs.none import NoCodec
from mpi_dasgd.config.schema import CodecConfig
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
    "Outcome",
    "make",
]


CODECS: dict[str, Callable[[int, np.dtype, CodecConfig, Seeds], Codec]] = {
    "none": lambda n, dtype, settings, seeds: NoCodec(n, dtype),
    "bf16": lambda n, dtype, settings, seeds: BFloat16Codec(n, dtype),
    "fp16": lambda n, dtype, settings, seeds: Float16Codec(n, dtype),
    "lattice4": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 4, settings, seeds),
    "lattice8": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 8, settings, seeds),
    "lattice16": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 16, settings, seeds),
    "qsgd8": lambda n, dtype, settings, seeds: QsgdCodec(n, dtype, seeds),
}


def make(
    settings: CodecConfig,
    elements: int,
    dtype: np.dtype,
    *,
    seed: int,
    rank: int,
    trailer_words: int = 0,
) -> Codec:
    """Return a rank's codec for models of `elements` elements of `dtype`.

    Args:
        settings: section ``codec`` of the configuration.
        elements: number of model elements, padding included.
        dtype: type of the model.
        seed: seed of the run.
        rank: rank that the codec belongs to.
        trailer_words: 64-bit words that the algorithm adds to each message.

    Raises:
        UserError: the name is unknown, or the codec does not accept such models.
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
