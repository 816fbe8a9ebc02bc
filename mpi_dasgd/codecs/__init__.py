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
from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST
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
    "runs_on_device",
]


CODECS: dict[str, Callable[[int, np.dtype, CodecConfig, Seeds], Codec]] = {
    "none": lambda n, dtype, settings, seeds: NoCodec(n, dtype, settings.thread_count),
    "bf16": lambda n, dtype, settings, seeds: BFloat16Codec(n, dtype),
    "fp16": lambda n, dtype, settings, seeds: Float16Codec(n, dtype),
    "lattice4": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 4, settings, seeds),
    "lattice8": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 8, settings, seeds),
    "lattice16": lambda n, dtype, settings, seeds: LatticeCodec(n, dtype, 16, settings, seeds),
    "qsgd8": lambda n, dtype, settings, seeds: QsgdCodec(n, dtype, seeds),
}


_ON_DEVICE = frozenset({"none", "bf16", "fp16", "lattice4", "lattice8", "lattice16"})


def runs_on_device(name: str, dtype: np.dtype) -> bool:
    """Return whether `make` has the codec `name` on a GPU, for models of `dtype`."""
    return dtype == np.float32 and name in _ON_DEVICE


def make(
    settings: CodecConfig,
    elements: int,
    dtype: np.dtype,
    *,
    seed: int,
    rank: int,
    trailer_words: int = 0,
    device: Device = HOST,
    threads: int = 1,
) -> Codec:
    """Return a rank's codec for models of `elements` elements of `dtype`.

    Args:
        settings: section ``codec`` of the configuration.
        elements: number of model elements, padding included.
        dtype: type of the model.
        seed: seed of the run.
        rank: rank that the codec belongs to.
        trailer_words: 64-bit words that the algorithm adds to each message.
        device: device of the models and of the messages' bodies; it must be that of the calling
            thread (`Device.bind`).
        threads: threads that ``codec.threads = auto`` stands for.

    Raises:
        UserError: the name is unknown, or the codec does not accept such models, or not on a GPU.
    """
    name = settings.name
    if name not in CODECS:
        raise UserError(
            f"codec {name!r} is not known{nearest(name, CODECS)} (valid: {', '.join(CODECS)})"
        )
    seeds = Seeds(seed, rank)
    if settings.threads == "auto":
        settings = settings.model_copy(update={"threads": threads})
    if device.xp is np:
        codec = CODECS[name](elements, dtype, settings, seeds)
    else:
        codec = _make_on_device(settings, elements, dtype, seeds, device)
    if trailer_words:
        codec.layout = dataclasses.replace(codec.layout, trailer_words=trailer_words)
    return codec


def _make_on_device(
    settings: CodecConfig, elements: int, dtype: np.dtype, seeds: Seeds, device: Device
) -> Codec:
    name = settings.name
    if not runs_on_device(name, dtype):
        raise UserError(
            f"codec.name: {name!r} does not run on {device.name} for models of {dtype}; set "
            "transport.memory=host, or take another codec and float32 models"
        )
    # Not at the top: on the host nothing of a GPU is needed.
    from mpi_dasgd.codecs import device_elementwise, device_lattice

    codec: Codec
    with device.current_stream():
        if name.startswith("lattice"):
            bits = int(name.removeprefix("lattice"))
            codec = device_lattice.DeviceLatticeCodec(
                elements, dtype, bits, settings, seeds, device
            )
        else:
            codec = device_elementwise.CODECS[name](elements, dtype, device)
        device.mark().wait()  # its memory is zero for whatever stream comes next
    return codec
