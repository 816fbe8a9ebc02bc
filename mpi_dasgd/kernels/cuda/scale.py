"""The adaptive scales of the lattice codec on a GPU: ``scale.cu``.

They are those of `mpi_dasgd.codecs.bucket_scale.AdaptiveScale`, bit for bit. Nothing waits, and no
array goes to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpi_dasgd.kernels.encoded import Array

__all__ = ["TOTALS", "BucketScales", "ScaleUpdate"]

TOTALS = 3
"""Numbers that `BucketScales.learn` writes: buckets of the partner's publication that were
rejected, buckets of deltas that were corrupt, and the squared distance to the partner's model."""


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
    """

    def __init__(
        self, buckets: int, scale_per_distance: float, decay: float, doubles_estimate: bool
    ) -> None:
        import cupy

        self.estimate: Array = cupy.zeros(buckets, "f4")
        self._scale_per_distance = scale_per_distance
        self._decay = decay
        self._doubles_estimate = doubles_estimate

    def measure(self, x: Array) -> None:
        """Measure the range of each bucket of `x`, and guess the estimates if all of them are 0.

        Args:
            x: model, float32, shape (elements,), aligned to 16 bytes.
        """
        raise NotImplementedError

    def next_scales(self, out: Array) -> None:
        """Write the scales for the next encoding to `out`, float32, shape (buckets,)."""
        raise NotImplementedError

    def learn(self, update: ScaleUpdate) -> None:
        """Update the estimates after an exchange: the deltas in their order, then the partner."""
        raise NotImplementedError
