"""Exchanges as the scale of the lattice codec sees them, on the host and on a GPU.

for name, expected, found in compare_scales(bits=8, device=cupy.asarray, host=cupy.asnumpy):
    assert expected == found, name
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.codecs.bucket_scale import REFRESH_ENCODINGS
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.kernels.cuda.scale import TOTALS, BucketScales, ScaleUpdate
from mpi_dasgd.kernels.encoded import BUCKET, BUCKET_STATS, Array, buckets_of

__all__ = ["compare_scales"]

F32 = np.dtype(np.float32)
BAD_SCALES = np.array([np.nan, np.inf, -np.inf, -1.0, 1e-40, -1e-45, 3e38, 0.0], F32)
"""Scales that no publication has; the bucket is rejected."""


def compare_scales(
    bits: int,
    rounds: int,
    device: Callable[[np.ndarray], Array],
    host: Callable[[Array], np.ndarray],
    elements: int = 600 * BUCKET - 37,
) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield a name, the bytes of the host's codec, and those of `BucketScales`.

    Args:
        bits: bits per code.
        rounds: number of exchanges.
        device: copies an array to the device.
        host: copies it back.
        elements: number of model elements.
    """
    rng = np.random.default_rng([bits, elements])
    codec: Any = codecs.make(CodecConfig(name=f"lattice{bits}"), elements, F32, seed=1, rank=0)
    scale = codec.scale
    found = BucketScales(
        buckets_of(elements), float(scale._scale_per_distance), float(scale._decay), bits > 4
    )
    out, totals = (
        device(np.full(n, -1, dtype))
        for n, dtype in ((buckets_of(elements), F32), (TOTALS, np.dtype(np.float64)))
    )
    x = _model(rng, elements)
    for number in range(rounds):
        if number == 2:  # the first encoding; deltas and partners may come before, as above
            scale.estimate[:] = 0
            found.estimate.fill(0)
        if number >= 2:
            if number % 5 == 2:  # a measurement
                x = np.zeros_like(x) if number == 2 and bits == 16 else _model(rng, elements)
                scale.struct.encodings = REFRESH_ENCODINGS * number
                found.measure(device(x))
            expected_out = np.empty(buckets_of(elements), F32)
            with np.errstate(over="ignore"):
                scale.scales(x, expected_out)
            found.next_scales(out)
            yield f"{number}: out", expected_out.tobytes(), host(out).tobytes()
        deltas = [_delta(rng, buckets_of(elements)) for _ in range(rng.integers(0, 7))]
        partner = _partner(rng, buckets_of(elements), rng.choice([0, 0.1, 1])) if number % 4 else ()
        weight = float(rng.choice([0.5, 0.25, 0.1, 1 / 3]))
        expected_totals = _observe(codec, deltas, weight, partner)
        on_device = [
            tuple(map(device, pair)) for pair in (*deltas, *([partner] if partner else []))
        ]
        update = ScaleUpdate(
            totals,
            tuple(stats for stats, _ in on_device[: len(deltas)]),
            tuple(units for _, units in on_device[: len(deltas)]),
            weight,
            *(on_device[-1] if partner else (None, None)),
        )
        found.learn(update)
        rejected, corrupt, square = host(totals)
        yield f"{number}: estimate", scale.estimate.tobytes(), host(found.estimate).tobytes()
        yield f"{number}: last", scale._last_scales.tobytes(), host(found.last).tobytes()
        yield f"{number}: floor", scale._floor.tobytes(), host(found.floor).tobytes()
        most = np.asarray(scale._max_estimate, F32)
        yield f"{number}: max_estimate", most.tobytes(), host(found.max_estimate).tobytes()
        distance = expected_totals[2]
        close = np.isclose(square**0.5, distance, rtol=1e-9, equal_nan=True)
        yield f"{number}: distance", b"close", b"close" if close else repr(square).encode()
        counts = (int(rejected), int(corrupt))
        yield f"{number}: counts", repr(expected_totals[:2]).encode(), repr(counts).encode()


def _observe(
    codec: Any, deltas: list[tuple[np.ndarray, ...]], weight: float, partner: tuple[np.ndarray, ...]
) -> tuple[int, int, float]:
    """Let the host's codec learn; return its numbers of rejected and corrupt buckets, distance."""
    before = codec.counters["buckets_corrupt"]
    rejected, distance = 0, 0.0
    with np.errstate(all="ignore"):
        for stats, units in deltas:
            codec._observe_delta(SimpleNamespace(scales=units), stats, weight)
        if partner:
            codec._stats[:], scales = partner
            outcome = codec._observe(SimpleNamespace(scales=scales))
            rejected, distance = outcome.rejected, outcome.distance
    return rejected, codec.counters["buckets_corrupt"] - before, distance


def _model(rng: np.random.Generator, elements: int) -> np.ndarray:
    """Return a model with buckets of many magnitudes, and some of NaN, infinity and denormals."""
    buckets = buckets_of(elements)
    magnitude = (10.0 ** rng.uniform(-20, 20, buckets)).astype(F32)
    x = rng.standard_normal(buckets * BUCKET, F32).reshape(buckets, BUCKET) * magnitude[:, None]
    x[3] = 0
    x[4] = -0.0
    x[5] *= 0
    x[5, 7] = -1e-42  # a denormal number is the largest
    x[6] = -np.abs(x[6])
    for bucket, value in ((10, np.nan), (11, np.inf), (12, -np.inf), (13, 3e38)):
        x[bucket, rng.integers(BUCKET)] = value
    return x.reshape(-1)[:elements].copy()


def _stats(rng: np.random.Generator, buckets: int, rejected: np.ndarray) -> np.ndarray:
    stats = np.zeros(buckets, BUCKET_STATS)
    stats["max_d2"] = rng.choice([0, 1, 2, 3, 127**2, 2**14, 2**24 + 1, 2**30], buckets)
    stats["sum_d2"] = stats["max_d2"] * rng.integers(1, BUCKET, buckets, dtype=np.uint64)
    stats[rejected] = 0
    stats["rejected"] = rejected
    return stats


def _delta(rng: np.random.Generator, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Return statistics and units of a delta, of which some are corrupt, or rejected by others."""
    units = (rng.choice([-1, -1, 1], buckets) * 10.0 ** rng.uniform(-44, 38, buckets)).astype(F32)
    units[rng.random(buckets) < 0.1] = 0
    corrupt = rng.random(buckets) < rng.choice([0, 0.1])
    units[corrupt] = rng.choice(np.append(BAD_SCALES, np.float32(7)), corrupt.sum())
    return _stats(rng, buckets, corrupt), units


def _partner(rng: np.random.Generator, buckets: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return statistics and scales of a publication, a share of whose buckets is rejected."""
    rejected = rng.random(buckets) < share
    scales = (10.0 ** rng.uniform(-37, 37, buckets)).astype(F32)
    some = rejected & (rng.random(buckets) < 0.5)
    scales[some] = rng.choice(BAD_SCALES, some.sum())
    return _stats(rng, buckets, rejected), scales
