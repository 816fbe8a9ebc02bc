"""Whether the check of a lattice bucket fails exactly where a decoding failed.

The truth is computed here: the lattice points of both models as whole numbers, by the rounded operations
that IEEE 754 defines and without the codes. Only the dither comes from the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels import lattice, reference
from mpi_dasgd.kernels.encoded import BITS, BUCKET, BUCKET_STATS, EncodedVector

__all__ = ["Case", "cases", "detection"]

_BLOCK = 32  # buckets at a time: the temporaries stay in the cache
_NARROWEST, _WIDEST = 3.2, 6.0  # reach of the code in standard deviations of the distance


class Case(NamedTuple):
    """What was found in one block of buckets.

    Attributes:
        bits, law, operation: codes, distribution of the distances, and how they were decoded.
        failing, sound: buckets in which an element was, and none was, beyond the reach of the code.
        undetected: failing, and not rejected.
        false_alarms: sound, and rejected.
        wrong: elements beyond the reach.
        single: buckets with one such element.
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


def detection(buckets: int, seed: int) -> dict[str, int]:
    """Return how many buckets were failing, sound, undetected and false alarms."""
    found = list(cases(buckets, seed))
    names = ("failing", "sound", "undetected", "false_alarms")
    return {name: sum(getattr(case, name) for case in found) for name in names}


def cases(buckets: int, seed: int) -> Iterator[Case]:
    """Yield blocks of random buckets, `buckets` or a few more in all, all kinds alike."""
    kinds = [(bits, law, op) for bits in BITS for law in _LAWS for op in ("exchange", "merge")]
    rng = np.random.Generator(np.random.SFC64([seed, 2]))
    for number in range(-(-buckets // _BLOCK)):
        yield _case(rng, *kinds[number % len(kinds)])


def _case(rng: np.random.Generator, bits: int, law: str, operation: str) -> Case:
    half = 2 ** (bits - 1)
    shape = (_BLOCK, BUCKET)
    scales = np.exp(rng.uniform(np.log(1e-6), np.log(1e-2), _BLOCK)).astype(np.float32)
    # Where the models lie beside the lattice, up to near its end.
    spread = scales * np.exp2(rng.uniform(4, 21, _BLOCK)).astype(np.float32)
    x = (rng.random(shape, np.float32) - np.float32(0.5)) * spread[:, None]
    deviation = scales * (half / rng.uniform(_NARROWEST, _WIDEST, _BLOCK)).astype(np.float32)
    y = x + _LAWS[law](rng, shape) * deviation[:, None]

    encoded = EncodedVector.empty(x.size, bits, int(rng.integers(2**64, dtype=np.uint64)))
    encoded.scales[:] = scales
    lattice.encode(x.reshape(-1), encoded)
    found = np.zeros(_BLOCK, BUCKET_STATS)
    if operation == "exchange":
        lattice.exchange(y.reshape(-1).copy(), encoded, 0.5, None, found)
    else:
        lattice.merge(y.reshape(-1).copy(), encoded, 0.5, found)
    rejected = found["rejected"] != 0

    dither = _dither(encoded.seed)
    apart = _points(x, scales, dither) - _points(
        y, scales, dither if operation == "exchange" else None
    )
    beyond = ((apart < -half) | (apart > half - 1)).sum(1)
    failing = beyond > 0
    return Case(
        bits, law, operation,
        failing=int(failing.sum()), sound=int((~failing).sum()),
        undetected=int((failing & ~rejected).sum()), false_alarms=int((~failing & rejected).sum()),
        wrong=int(beyond.sum()), single=int((beyond == 1).sum()),
    )  # fmt: skip


def _gauss(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _laplace(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return Laplace numbers of variance 1."""
    size = rng.standard_exponential(shape, np.float32)
    size *= np.float32(0.5**0.5)
    return np.where(rng.random(shape, np.float32) < np.float32(0.5), -size, size)


_LAWS = {"gauss": _gauss, "laplace": _laplace}


def _dither(seed: int) -> np.ndarray:
    return reference.dither(reference.bucket_keys(seed, np.arange(_BLOCK, dtype=np.uint64)))


def _points(x: np.ndarray, scales: np.ndarray, dither: np.ndarray | None) -> np.ndarray:
    """Return the lattice points nearest to x / scale + dither, as int32.

    Raises:
        MpiDasgdError: one is out of range, so that this data does not test what it should.
    """
    where = x * (np.float32(1) / scales)[:, None]
    if dither is not None:
        where += dither
    np.rint(where, out=where)
    if not -(2.0**22) < where.min() <= where.max() < 2.0**22:
        raise MpiDasgdError("bench quality: the random models lie beyond the range of the lattice")
    return where.astype(np.int32)
