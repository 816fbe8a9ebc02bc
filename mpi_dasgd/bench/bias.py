"""Whether codecs that claim to round without bias do: their mean error over many messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd.bench.codec_error import message, models, open_pair
from mpi_dasgd.kernels import lattice
from mpi_dasgd.kernels.encoded import BITS, BUCKET, EncodedVector

__all__ = ["Bias", "biases"]

_BUCKETS = 16
_DISTANCE = 0.3  # so far that the roundings of float32, which are not at random, do not count


class Bias(NamedTuple):
    """The mean error of one way to move, whose single errors are independent from message to message.

    Attributes:
        method: codec, and how it was used.
        messages: number of them.
        rms: RMS of one element's error in one message; the unit of `mean` and `deviation`.
        mean: mean error of all elements and messages.
        deviation: its standard error.
        z: mean / deviation.
        element_z2: mean over the elements of (mean error / its standard error)^2; 1 if unbiased.
        largest_z: largest of |mean error / its standard error| of an element.
    """

    method: str
    messages: int
    rms: float
    mean: float
    deviation: float
    z: float
    element_z2: float
    largest_z: float


def biases(messages: int, seed: int) -> Iterator[Bias]:
    """Yield the bias of every method that claims to have none."""
    x, y = models(_DISTANCE, _BUCKETS, seed)
    for number, name in enumerate(("qsgd8", "lattice4", "lattice8", "lattice16")):
        yield _bias(f"{name} exchange", messages, _exchanges(name, x, y, seed + number))
    for bits in BITS:
        yield _bias(f"lattice{bits} merge", messages, _merges(bits, x, y, seed + 100 + bits))


_Draw = Callable[[], np.ndarray]  # makes a message and returns its errors


def _exchanges(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> _Draw:
    theirs, mine = open_pair(name, x, y, seed)
    publication, reply = message(theirs), message(mine)
    apart = x.astype(np.float64) - y

    def draw() -> np.ndarray:
        theirs.encode(x, publication)
        moved = y.copy()
        mine.average_pair(moved, (), publication, 0.5, reply, None)
        return (moved.astype(np.float64) - y) / 0.5 - apart

    return draw


def _merges(bits: int, x: np.ndarray, y: np.ndarray, seed: int) -> _Draw:
    theirs, _ = open_pair(f"lattice{bits}", x, y, seed)
    publication = message(theirs)
    encoded = EncodedVector(
        x.size, bits, publication.payload, publication.scales, publication.checksums
    )

    def draw() -> np.ndarray:
        theirs.encode(x, publication)
        encoded.seed = publication.seed
        moved = y.copy()
        lattice.merge(moved, encoded, 1.0)
        return moved.astype(np.float64) - x

    return draw


def _bias(method: str, messages: int, draw: _Draw) -> Bias:
    sums, squares = np.zeros(_BUCKETS * BUCKET), np.zeros(_BUCKETS * BUCKET)
    means = np.empty(messages)  # each over the elements, which share their dither's key
    for number in range(messages):
        error = draw()
        sums += error
        squares += np.square(error)
        means[number] = error.mean()
    mean = sums / messages
    variance = (squares / messages - np.square(mean)) / (messages - 1)
    rms = float(np.sqrt(squares.mean() / messages))
    moving = variance > (1e-3 * rms) ** 2 / messages  # some elements always round to the same
    z = mean[moving] / np.sqrt(variance[moving])
    deviation = float(means.std(ddof=1)) / messages**0.5
    return Bias(
        method, messages, rms, float(means.mean()) / rms, deviation / rms,
        float(means.mean()) / deviation, float(np.square(z).mean()), float(np.abs(z).max()),
    )  # fmt: skip
