"""Error of one pair average through a codec, against the exact average of the two models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.codecs import Codec, ExchangeBuffers, Message
from mpi_dasgd.codecs.bucket_scale import AdaptiveScale
from mpi_dasgd.codecs.lattice import LatticeCodec
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.kernels import lattice
from mpi_dasgd.kernels.encoded import BUCKET, BUCKET_STATS, EncodedVector, buckets_of

__all__ = [
    "METHODS",
    "SCALE_MARGIN",
    "ErrorResult",
    "bucket_max",
    "codec_pair",
    "empty_message",
    "measure_errors",
    "random_models",
]

SCALE_MARGIN = 1.5
"""Margin of the scale over the largest distance of a bucket, which is known here."""

METHODS = (
    "none",
    "bf16",
    "fp16",
    "qsgd8",
    "lattice4",
    "lattice8",
    "lattice16",
    "lattice8 power of two",
    "lattice8 one scale",
    "lattice8 merge",
    "lattice8 merge subtracted",
)
"""Codecs as ranks use them, and variants of the 8-bit lattice codec."""

# Buckets per layer of the random models.
_LAYER_BUCKETS = 16


class ErrorResult(NamedTuple):
    """Errors of one method for one pair of models x and y.

    The names are columns of stored samples; `ends` keeps its old name for that reason.

    Attributes:
        method: one of `METHODS`.
        distance: RMS(x - y) before the average.
        error: RMS(change of y / weight - (x - y)) / distance.
        ends: RMS(x - y) after both have moved / distance; 0 for an exact average with weight 1/2.
        rejected: number of rejected buckets.
    """

    method: str
    distance: float
    error: float
    ends: float
    rejected: int


def random_models(distance: float, buckets: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random models, float32, shape (buckets * `BUCKET`,), at a given distance.

    The elements of a layer are normal, with a standard deviation that is log-normal around 0.1.
    The distances of the buckets are log-normal, too.

    Args:
        distance: RMS distance of the models.
        buckets: number of buckets.
        seed: seed of the random numbers.
    """
    rng = np.random.default_rng([seed, 1])
    layers = 0.1 * np.exp(rng.normal(size=-(-buckets // _LAYER_BUCKETS)))
    x = rng.normal(size=(buckets, BUCKET)) * np.repeat(layers, _LAYER_BUCKETS)[:buckets, None]
    difference = rng.normal(size=(buckets, BUCKET)) * np.exp(0.7 * rng.normal(size=(buckets, 1)))
    difference *= distance / np.sqrt(np.square(difference).mean())
    return x.astype(np.float32).reshape(-1), (x + difference).astype(np.float32).reshape(-1)


def bucket_max(vector: np.ndarray) -> np.ndarray:
    """Return the largest absolute value of each bucket, float32, shape (buckets,).

    Args:
        vector: any floating dtype, shape (buckets * `BUCKET`,).
    """
    return np.abs(vector).reshape(-1, BUCKET).max(1).astype(np.float32)


def empty_message(codec: Codec) -> Message:
    """Return a message of a codec with a valid header and a payload of zeros."""
    message = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
    message.stamp(rank=0, step=0, time_ns=0)
    return message


def codec_pair(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[Codec, Codec]:
    """Return the codecs of two ranks; lattice codecs know the distance of the models.

    Args:
        name: name of the codec.
        x, y: models of the ranks, float32, shape (buckets * `BUCKET`,).
        seed: seed of the codecs' messages.
    """
    config = CodecConfig(name=name, scale_margin=SCALE_MARGIN)
    pair = [codecs.make(config, x.size, x.dtype, seed=seed, rank=rank) for rank in range(2)]
    for codec in pair:
        if isinstance(codec, LatticeCodec):
            codec.scale.estimate[:] = bucket_max(x.astype(np.float64) - y)
    return pair[0], pair[1]


def measure_errors(distance: float, buckets: int, seed: int) -> Iterator[ErrorResult]:
    """Yield the errors of every method for the same two models.

    Args:
        distance: RMS distance of the models.
        buckets: number of buckets of the models.
        seed: seed of models and messages.
    """
    x, y = random_models(distance, buckets, seed)
    difference = x.astype(np.float64) - y
    before = _rms(difference)
    for method in METHODS:
        new_x, new_y = x.copy(), y.copy()
        if " " not in method:
            rejected = _exchange(method, new_x, new_y, seed)
        elif "merge" in method:
            rejected = _merge(new_x, new_y, seed, subtract="subtracted" in method)
        else:
            rejected = _exchange_with_other_scales(method, new_x, new_y, seed)
        error = (new_y.astype(np.float64) - y) / 0.5 - difference
        after = new_x.astype(np.float64) - new_y
        yield ErrorResult(method, before, _rms(error) / before, _rms(after) / before, rejected)


# The functions below change both models in place and return the number of rejected buckets.


def _exchange(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> int:
    """Average by a codec: the rank of `y` reads the publication of `x` and replies with a delta."""
    codec_x, codec_y = codec_pair(name, x, y, seed)
    publication, delta = empty_message(codec_x), empty_message(codec_y)
    codec_x.encode(x, publication)
    outcome = codec_y.average_pair(y, ExchangeBuffers(partner_model=publication, reply_delta=delta))
    codec_x.average_pair(x, ExchangeBuffers(deltas=(delta,)))
    return outcome.value().rejected


def _exchange_with_other_scales(method: str, x: np.ndarray, y: np.ndarray, seed: int) -> int:
    """Average as the 8-bit lattice codec does, but with powers of two or one scale for all."""
    scales = _scales(x, y)
    if method.endswith("power of two"):
        scales = np.exp2(np.ceil(np.log2(scales)))
    else:
        scales[:] = scales.max()
    delta = EncodedVector.empty(x.size, 8, seed + 1)
    stats = np.zeros(buckets_of(x.size), BUCKET_STATS)
    lattice.exchange(y, _encode(x, scales, seed), 0.5, delta, stats)
    lattice.apply(x, delta)
    return int(stats["rejected"].sum())


def _merge(x: np.ndarray, y: np.ndarray, seed: int, *, subtract: bool) -> int:
    """Average each model with the publication of the other, without a reply."""
    scales, stats = _scales(x, y), np.zeros(buckets_of(x.size), BUCKET_STATS)
    encoded_x, encoded_y = _encode(x, scales, seed), _encode(y, scales, seed + 1)
    lattice.merge(y, encoded_x, 0.5, stats, subtract_dither=subtract)
    lattice.merge(x, encoded_y, 0.5, subtract_dither=subtract)
    return int(stats["rejected"].sum())


def _scales(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the scales that the 8-bit lattice codec would choose, float32, shape (buckets,)."""
    adaptive_scale = AdaptiveScale(x.size, 8, BUCKET, SCALE_MARGIN, 0.5)
    adaptive_scale.estimate[:] = bucket_max(x.astype(np.float64) - y)
    scales = np.empty(buckets_of(x.size), np.float32)
    adaptive_scale.scales(x, scales)
    return scales


def _encode(x: np.ndarray, scales: np.ndarray, seed: int) -> EncodedVector:
    encoded = EncodedVector.empty(x.size, 8, seed)
    encoded.scales[:] = scales
    lattice.encode(x, encoded)
    return encoded


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
