"""Bias of the codecs with stochastic rounding: the mean of their errors over many messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd.bench.codec_error import codec_pair, empty_message, random_models
from mpi_dasgd.codecs import ExchangeBuffers
from mpi_dasgd.kernels import lattice
from mpi_dasgd.kernels.encoded import BITS, BUCKET, EncodedVector

__all__ = ["BiasResult", "measure_bias"]

_BUCKETS = 16
# RMS distance of the models: large, so that the rounding of float32, not random, is negligible.
_DISTANCE = 0.3


class BiasResult(NamedTuple):
    """Mean error of one method, whose errors are independent from message to message.

    The names are columns of stored samples.

    Attributes:
        method: codec, and how it is used.
        messages: number of messages.
        rms: RMS error of one element in one message.
        mean: mean error of all elements and messages, in units of `rms`.
        deviation: standard error of `mean`, in units of `rms`.
        z: mean / deviation.
        element_z2: mean over the elements of (mean error / its standard error)^2; 1 if unbiased.
        largest_z: largest |mean error / its standard error| of an element.
    """

    method: str
    messages: int
    rms: float
    mean: float
    deviation: float
    z: float
    element_z2: float
    largest_z: float


def measure_bias(messages: int, seed: int) -> Iterator[BiasResult]:
    """Yield the bias of every method that is claimed to be unbiased.

    Args:
        messages: number of messages per method.
        seed: seed of models and messages.
    """
    x, y = random_models(_DISTANCE, _BUCKETS, seed)
    for number, name in enumerate(("qsgd8", "lattice4", "lattice8", "lattice16")):
        yield _bias(f"{name} exchange", messages, _exchanges(name, x, y, seed + number))
    for bits in BITS:
        yield _bias(f"lattice{bits} merge", messages, _merges(bits, x, y, seed + 100 + bits))


_DrawErrors = Callable[[], np.ndarray]
"""Encodes and applies a new message; returns the errors, float64, shape (elements,)."""


def _exchanges(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> _DrawErrors:
    codec_x, codec_y = codec_pair(name, x, y, seed)
    publication, delta = empty_message(codec_x), empty_message(codec_y)
    difference = x.astype(np.float64) - y

    def draw_errors() -> np.ndarray:
        codec_x.encode(x, publication)
        new_y = y.copy()
        codec_y.average_pair(new_y, ExchangeBuffers(partner_model=publication, reply_delta=delta))
        return (new_y.astype(np.float64) - y) / 0.5 - difference

    return draw_errors


def _merges(bits: int, x: np.ndarray, y: np.ndarray, seed: int) -> _DrawErrors:
    codec_x, _ = codec_pair(f"lattice{bits}", x, y, seed)
    publication = empty_message(codec_x)
    encoded = EncodedVector(
        x.size, bits, publication.payload, publication.scales, publication.checksums
    )

    def draw_errors() -> np.ndarray:
        codec_x.encode(x, publication)
        encoded.seed = publication.seed
        new_y = y.copy()
        lattice.merge(new_y, encoded, 1.0)
        return new_y.astype(np.float64) - x

    return draw_errors


def _bias(method: str, messages: int, draw_errors: _DrawErrors) -> BiasResult:
    sums, squares = np.zeros(_BUCKETS * BUCKET), np.zeros(_BUCKETS * BUCKET)
    # The elements of a message share the key of their dither: only messages are independent.
    means = np.empty(messages)
    for number in range(messages):
        errors = draw_errors()
        sums += errors
        squares += np.square(errors)
        means[number] = errors.mean()
    mean = sums / messages
    variance = (squares / messages - np.square(mean)) / (messages - 1)
    rms = float(np.sqrt(squares.mean() / messages))
    # Some elements always round to the same point: their error does not vary.
    varies = variance > (1e-3 * rms) ** 2 / messages
    z = mean[varies] / np.sqrt(variance[varies])
    deviation = float(means.std(ddof=1)) / messages**0.5
    return BiasResult(
        method=method,
        messages=messages,
        rms=rms,
        mean=float(means.mean()) / rms,
        deviation=deviation / rms,
        z=float(means.mean()) / deviation,
        element_z2=float(np.square(z).mean()),
        largest_z=float(np.abs(z).max()),
    )
