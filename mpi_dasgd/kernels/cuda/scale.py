"""The adaptive scales of the lattice codec on a GPU: ``scale.cu``.

They are those of `mpi_dasgd.codecs.bucket_scale.AdaptiveScale`, bit for bit. Nothing waits, and no
array goes to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.kernels.cuda.program import (
    MAX_DELTAS,
    POINTER,
    THREADS,
    Program,
    address,
    aligned,
    multiprocessors,
)
from mpi_dasgd.kernels.encoded import Array

__all__ = ["SCALE", "SCALE_ARGUMENTS", "TOTALS", "BucketScales", "ScaleUpdate"]

TOTALS = 3
"""Numbers that `BucketScales.learn` writes: buckets of the partner's publication that were
rejected, buckets of deltas that were corrupt, and the squared distance to the partner's model."""

# Blocks of a launch, at most. Each of their warps leaves a number, and one warp sums them all up.
_BLOCKS = 128
_WARPS = _BLOCKS * THREADS // 32
_MAX_ESTIMATE = np.array([1e30], np.float32)  # before the first measurement
_STATE = ("estimate", "floor", "last", "max_estimate", "largest", "ranges", "partial")

SCALE_ARGUMENTS = np.dtype(
    [
        ("x", POINTER), ("elements", np.int64), ("buckets", np.int64),
        *((name, POINTER) for name in (*_STATE, "totals", "out")),
        ("delta_stats", POINTER, MAX_DELTAS), ("delta_units", POINTER, MAX_DELTAS),
        ("stats", POINTER), ("partner_scales", POINTER),
        *((name, np.float32) for name in ("scale_per_distance", "decay", "inverse_weight")),
        *((name, np.int32) for name in ("doubles_estimate", "delta_count", "adds", "warps")),
    ],
    align=True,
)  # fmt: skip
"""Mirror of MpdScaleArguments of ``scale.cu``."""

SCALE = Program("scale.cu", SCALE_ARGUMENTS, f"=Q2q9Q{2 * MAX_DELTAS}Q2Q3f4i4x")
"""The kernels of ``scale.cu``."""

_NO_DELTAS = (0,) * (2 * MAX_DELTAS)


@dataclass(slots=True)
class ScaleUpdate:
    """What an exchange found, as the kernels left it on the device.

    Attributes:
        totals: receives the `TOTALS` numbers, float64, shape (3,), on the device or in memory that
            is mapped to it.
        delta_stats: statistics of each absorbed delta, `BUCKET_STATS`, shape (buckets,), in the
            order in which they were absorbed.
        delta_units: their units, the ``scales`` of their messages, float32, shape (buckets,).
        weight: share of the distance that both sides move, in (0, 1/2].
        stats: statistics of the partner's publication, or None without a partner.
        partner_scales: scales of that publication, float32, shape (buckets,).
    """

    totals: Array
    delta_stats: Sequence[Array] = ()
    delta_units: Sequence[Array] = ()
    weight: float = 0.5
    stats: Array | None = None
    partner_scales: Array | None = None


class BucketScales:
    """Estimates and scales of all buckets, in the memory of CuPy's current device.

    All work is enqueued on CuPy's current stream, and must be asked for in the order of the
    exchanges: `measure` (before the first and then before every 64th encoding), `next_scales`, the
    exchange itself, `learn`.

    Args:
        buckets: number of buckets of the model.
        scale_per_distance: ratio of a scale to its estimate.
        decay: factor on the estimate per exchange, in (0, 1).
        doubles_estimate: whether a rejection also doubles the own estimate (above 4 bits).

    Attributes:
        estimate: estimated largest distances, float32, shape (buckets,); 0 before the first
            `measure`.
        last: scales that `next_scales` wrote last, float32, shape (buckets,).
        floor: smallest scales, float32, shape (buckets,).
        max_estimate: to which a rejection may raise an estimate, float32, shape (1,).
    """

    def __init__(
        self, buckets: int, scale_per_distance: float, decay: float, doubles_estimate: bool
    ) -> None:
        import cupy

        self.estimate: Array = cupy.zeros(buckets, np.float32)
        self.last: Array = cupy.zeros(buckets, np.float32)
        self.floor: Array = cupy.zeros(buckets, np.float32)
        self.max_estimate: Array = cupy.asarray(_MAX_ESTIMATE)
        self._scratch = (
            cupy.zeros(buckets, np.float32),
            cupy.zeros(2 * _WARPS, np.uint32),
            cupy.zeros(TOTALS * _WARPS, np.float64),
        )
        self._addresses = tuple(
            address(array)
            for array in (
                self.estimate, self.floor, self.last, self.max_estimate, *self._scratch,
            )
        )  # fmt: skip
        self._buckets = buckets
        self._blocks = min(_BLOCKS, -(-buckets // THREADS))
        self._parameters = scale_per_distance, decay
        self._doubles_estimate = doubles_estimate

    def measure(self, x: Array) -> None:
        """Measure the range of each bucket of `x`, and guess the estimates if all of them are 0.

        Args:
            x: model, float32, shape (elements,), aligned to 16 bytes.

        Raises:
            UserError: it is not aligned, or the device is too old for the kernels.
        """
        multiprocessors()  # refuses a device that is too old
        blocks = min(_BLOCKS, -(-self._buckets // (THREADS // 32)))
        self._launch("mpd_measure", blocks, x=aligned("x", x, 16), elements=x.size)
        self._launch("mpd_guess_estimates", self._blocks, warps=blocks * (THREADS // 32))

    def next_scales(self, out: Array) -> None:
        """Write the scales for the next encoding to `out`, float32, shape (buckets,)."""
        self._launch("mpd_next_scales", self._blocks, out=address(out))

    def learn(self, update: ScaleUpdate) -> None:
        """Update the estimates after an exchange: the deltas in their order, then the partner."""
        stats, units = update.delta_stats, update.delta_units
        inverse_weight = 1 / update.weight
        adds = False
        while len(stats) > MAX_DELTAS:
            deltas = _pointers(stats[:MAX_DELTAS], units)
            self._launch(
                "mpd_learn", self._blocks, deltas=deltas, inverse_weight=inverse_weight,
                delta_count=MAX_DELTAS, adds=adds,
            )  # fmt: skip
            stats, units, adds = stats[MAX_DELTAS:], units[MAX_DELTAS:], True
        self._launch(
            "mpd_learn", self._blocks, deltas=_pointers(stats, units), stats=address(update.stats),
            partner_scales=address(update.partner_scales), inverse_weight=inverse_weight,
            delta_count=len(stats), adds=adds,
        )  # fmt: skip
        warps = self._blocks * (THREADS // 32)
        self._launch("mpd_total", 1, totals=address(update.totals), warps=warps)

    def _launch(
        self, name: str, blocks: int, *,
        x: int = 0, elements: int = 0, totals: int = 0, out: int = 0,
        deltas: tuple[int, ...] = _NO_DELTAS, stats: int = 0, partner_scales: int = 0,
        inverse_weight: float = 0.0, delta_count: int = 0, adds: bool = False, warps: int = 0,
    ) -> None:  # fmt: skip
        """Enqueue a kernel with these fields of its argument."""
        if blocks:
            SCALE.launch(
                name, (), blocks,
                x, elements, self._buckets, *self._addresses, totals, out, *deltas,
                stats, partner_scales, *self._parameters, inverse_weight,
                self._doubles_estimate, delta_count, adds, warps,
            )  # fmt: skip


def _pointers(stats: Sequence[Array], units: Sequence[Array]) -> tuple[int, ...]:
    """Return the addresses of up to 4 statistics, and of as many units."""
    missing = (0,) * (MAX_DELTAS - len(stats))
    return (*map(address, stats), *missing, *map(address, units[: len(stats)]), *missing)
