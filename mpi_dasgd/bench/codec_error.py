"""Two models that average through a codec: how far what moved is from what should have moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.codecs.bucket_scale import AdaptiveScale
from mpi_dasgd.codecs.lattice import LatticeCodec
from mpi_dasgd.kernels import lattice
from mpi_dasgd.kernels.encoded import BUCKET, BUCKET_STATS, EncodedVector, buckets_of

__all__ = [
    "GAMMA",
    "METHODS",
    "Error",
    "bucket_largest",
    "errors",
    "message",
    "models",
    "open_pair",
]

GAMMA = 1.5  # scale over what would just reach the largest difference, which is known here
_LAYER = 16  # buckets

METHODS = (
    "none", "bf16", "fp16", "qsgd8", "lattice4", "lattice8", "lattice16",
    "lattice8 power of two", "lattice8 one scale", "lattice8 merge", "lattice8 merge subtracted",
)  # fmt: skip
"""The codecs as they are used, and other ways to use the lattice of 8 bits."""


class Error(NamedTuple):
    """What became of one pair.

    Attributes:
        method: of `METHODS`.
        distance: RMS(x - y) before.
        error: RMS(what moved / weight - (x - y)) / distance.
        ends: RMS(x - y) after both have moved / distance; 0 without error and with weight 1/2.
        rejected: buckets.
    """

    method: str
    distance: float
    error: float
    ends: float
    rejected: int


def models(distance: float, buckets: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32 models whose elements are `distance` apart in the RMS.

    The elements of a layer are normal, its size log-normal around 0.1; the distances of the buckets
    are log-normal, too.
    """
    rng = np.random.default_rng([seed, 1])
    layers = 0.1 * np.exp(rng.normal(size=-(-buckets // _LAYER)))
    x = rng.normal(size=(buckets, BUCKET)) * np.repeat(layers, _LAYER)[:buckets, None]
    apart = rng.normal(size=(buckets, BUCKET)) * np.exp(0.7 * rng.normal(size=(buckets, 1)))
    apart *= distance / np.sqrt(np.square(apart).mean())
    return x.astype(np.float32).reshape(-1), (x + apart).astype(np.float32).reshape(-1)


def bucket_largest(vector: np.ndarray) -> np.ndarray:
    """Return the largest absolute value of each whole bucket, float32."""
    return np.abs(vector).reshape(-1, BUCKET).max(1).astype(np.float32)


def message(codec: Codec) -> Message:
    """Return an empty message of a codec, with a valid header."""
    new = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
    new.stamp(rank=0, step=0, time_ns=0)
    return new


def open_pair(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[Codec, Codec]:
    """Return the codecs of two ranks, which know how far their models are apart."""
    settings = codecs.Settings(name=name, scale_margin=GAMMA)
    pair = [codecs.make(settings, x.size, x.dtype, seed=seed, rank=rank) for rank in range(2)]
    for codec in pair:
        if isinstance(codec, LatticeCodec):
            codec.scale.estimate[:] = bucket_largest(x.astype(np.float64) - y)
    return pair[0], pair[1]


def errors(distance: float, buckets: int, seed: int) -> Iterator[Error]:
    """Yield the error of every method for the same two models."""
    x, y = models(distance, buckets, seed)
    apart = x.astype(np.float64) - y
    before = _rms(apart)
    for method in METHODS:
        new_x, new_y, rejected = x.copy(), y.copy(), 0
        if " " not in method:
            rejected = _exchange(method, new_x, new_y, seed)
        elif "merge" in method:
            rejected = _merge(new_x, new_y, seed, subtract="subtracted" in method)
        else:
            rejected = _other_scale(method, new_x, new_y, seed)
        error = (new_y.astype(np.float64) - y) / 0.5 - apart
        ends = new_x.astype(np.float64) - new_y
        yield Error(method, before, _rms(error) / before, _rms(ends) / before, rejected)


def _exchange(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> int:
    """Average by codec `name`: the rank of `y` begins."""
    theirs, mine = open_pair(name, x, y, seed)
    publication, reply = message(theirs), message(mine)
    theirs.encode(x, publication)
    outcome = mine.average_pair(y, (), publication, 0.5, reply, None)
    theirs.average_pair(x, (reply,), None, 0.5, None, None)
    return outcome.rejected


def _other_scale(method: str, x: np.ndarray, y: np.ndarray, seed: int) -> int:
    scales = _scales(x, y)
    if method.endswith("power of two"):
        scales = np.exp2(np.ceil(np.log2(scales)))
    else:
        scales[:] = scales.max()
    reply, found = (
        EncodedVector.empty(x.size, 8, seed + 1),
        np.zeros(buckets_of(x.size), BUCKET_STATS),
    )
    lattice.exchange(y, _encoded(x, scales, seed), 0.5, reply, found)
    lattice.apply(x, reply)
    return int(found["rejected"].sum())


def _merge(x: np.ndarray, y: np.ndarray, seed: int, *, subtract: bool) -> int:
    """Each side averages with the other's publication, and tells it nothing."""
    scales, found = _scales(x, y), np.zeros(buckets_of(x.size), BUCKET_STATS)
    of_x, of_y = _encoded(x, scales, seed), _encoded(y, scales, seed + 1)
    lattice.merge(y, of_x, 0.5, found, subtract_dither=subtract)
    lattice.merge(x, of_y, 0.5, subtract_dither=subtract)
    return int(found["rejected"].sum())


def _scales(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = AdaptiveScale(x.size, 8, BUCKET, GAMMA, 0.5)
    scale.estimate[:] = bucket_largest(x.astype(np.float64) - y)
    scales = np.empty(buckets_of(x.size), np.float32)
    scale.scales(x, scales)
    return scales


def _encoded(x: np.ndarray, scales: np.ndarray, seed: int) -> EncodedVector:
    encoded = EncodedVector.empty(x.size, 8, seed)
    encoded.scales[:] = scales
    lattice.encode(x, encoded)
    return encoded


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))
