"""Detection of decoding failures: whether the check of a lattice bucket fails exactly then.

The expected outcome is computed here: the lattice points of both models as integers, by operations
that round as IEEE 754 defines, and without codes. Only the dither comes from the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels import lattice, reference
from mpi_dasgd.kernels.encoded import BITS, BUCKET, BUCKET_STATS, EncodedVector

__all__ = ["BlockResult", "count_detections", "measure_detection"]

# Buckets per block: its temporaries fit in the cache.
_BLOCK = 32
# Range of the code in standard deviations of the distance: the limits between which it is drawn.
_MIN_RANGE, _MAX_RANGE = 3.2, 6.0
# Limit of the lattice: the absolute value of every point is smaller.
_MAX_POINT = 2.0**22


class BlockResult(NamedTuple):
    """Counts of one block of random buckets.

    The names are columns of stored samples; `law` and `sound` keep their old names for that
    reason.

    Attributes:
        bits: bits per code.
        law: distribution of the distances, ``gauss`` or ``laplace``.
        operation: how the buckets were decoded, ``exchange`` or ``merge``.
        failing: buckets with an element beyond the range of the code, which cannot be decoded.
        sound: buckets without one, which are valid.
        undetected: failing buckets that were not rejected.
        false_alarms: valid buckets that were rejected.
        wrong: elements beyond the range.
        single: buckets with exactly one such element.
    """

    bits: int
    law: str
    operation: str
    failing: int
    sound: int
    undetected: int
    false_alarms: int
    wrong: int
    single: int


def count_detections(buckets: int, seed: int) -> dict[str, int]:
    """Return the numbers of failing, sound and undetected buckets, and of false alarms.

    Args:
        buckets: number of random buckets, rounded up to whole blocks.
        seed: seed of the random numbers.
    """
    blocks = list(measure_detection(buckets, seed))
    names = ("failing", "sound", "undetected", "false_alarms")
    return {name: sum(getattr(block, name) for block in blocks) for name in names}


def measure_detection(buckets: int, seed: int) -> Iterator[BlockResult]:
    """Yield the counts of blocks, with all combinations of bits, distribution and operation.

    Args:
        buckets: number of random buckets, rounded up to whole blocks.
        seed: seed of the random numbers.
    """
    combinations = [
        (bits, law, operation)
        for bits in BITS
        for law in _DISTRIBUTIONS
        for operation in ("exchange", "merge")
    ]
    rng = np.random.Generator(np.random.SFC64([seed, 2]))
    for number in range(-(-buckets // _BLOCK)):
        yield _measure_block(rng, *combinations[number % len(combinations)])


def _measure_block(rng: np.random.Generator, bits: int, law: str, operation: str) -> BlockResult:
    half = 2 ** (bits - 1)
    shape = (_BLOCK, BUCKET)
    scales = np.exp(rng.uniform(np.log(1e-6), np.log(1e-2), _BLOCK)).astype(np.float32)
    # Size of the model in units of the scale, up to almost the limit of the lattice.
    spread = scales * np.exp2(rng.uniform(4, 21, _BLOCK)).astype(np.float32)
    x = (rng.random(shape, np.float32) - np.float32(0.5)) * spread[:, None]
    deviation = scales * (half / rng.uniform(_MIN_RANGE, _MAX_RANGE, _BLOCK)).astype(np.float32)
    y = x + _DISTRIBUTIONS[law](rng, shape) * deviation[:, None]

    encoded = EncodedVector.empty(x.size, bits, int(rng.integers(2**64, dtype=np.uint64)))
    encoded.scales[:] = scales
    lattice.encode(x.reshape(-1), encoded)
    stats = np.zeros(_BLOCK, BUCKET_STATS)
    if operation == "exchange":
        lattice.exchange(y.reshape(-1).copy(), encoded, 0.5, None, stats)
    else:
        lattice.merge(y.reshape(-1).copy(), encoded, 0.5, stats)
    rejected = stats["rejected"] != 0

    dither = _dither(encoded.seed)
    # A merge does not add the dither to the own model.
    own_dither = dither if operation == "exchange" else None
    difference = _points(x, scales, dither) - _points(y, scales, own_dither)
    beyond = ((difference < -half) | (difference > half - 1)).sum(1)
    failing = beyond > 0
    return BlockResult(
        bits=bits,
        law=law,
        operation=operation,
        failing=int(failing.sum()),
        sound=int((~failing).sum()),
        undetected=int((failing & ~rejected).sum()),
        false_alarms=int((~failing & rejected).sum()),
        wrong=int(beyond.sum()),
        single=int((beyond == 1).sum()),
    )


def _gauss(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return normal random numbers of variance 1, float32."""
    return rng.standard_normal(shape, np.float32)


def _laplace(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return Laplace random numbers of variance 1, float32."""
    size = rng.standard_exponential(shape, np.float32)
    size *= np.float32(0.5**0.5)
    return np.where(rng.random(shape, np.float32) < np.float32(0.5), -size, size)


_DISTRIBUTIONS = {"gauss": _gauss, "laplace": _laplace}


def _dither(seed: int) -> np.ndarray:
    """Return the dither of a block's message, float32, shape (`_BLOCK`, `BUCKET`)."""
    return reference.dither(reference.bucket_keys(seed, np.arange(_BLOCK, dtype=np.uint64)))


def _points(x: np.ndarray, scales: np.ndarray, dither: np.ndarray | None) -> np.ndarray:
    """Return the lattice points nearest to x / scale + dither, int32, shape (buckets, `BUCKET`).

    Args:
        x: model, float32, shape (buckets, `BUCKET`).
        scales: float32, shape (buckets,).
        dither: float32, shape (buckets, `BUCKET`); None for none.

    Raises:
        MpiDasgdError: a point is beyond the limit of the lattice.
    """
    points = x * (np.float32(1) / scales)[:, None]
    if dither is not None:
        points += dither
    np.rint(points, out=points)
    if not -_MAX_POINT < points.min() <= points.max() < _MAX_POINT:
        raise MpiDasgdError("bench quality: the random models lie beyond the range of the lattice")
    return points.astype(np.int32)
