"""The scale of each bucket of a lattice codec on a GPU, with the bits of `AdaptiveScale`."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.codecs.bucket_scale import REFRESH_ENCODINGS, scale_per_distance
from mpi_dasgd.device.base import Array
from mpi_dasgd.kernels.cuda.scale import BucketScales, ScaleUpdate
from mpi_dasgd.kernels.encoded import FusedStep

__all__ = ["DeviceScale"]


class DeviceScale:
    """`AdaptiveScale` in the memory of a GPU. It only asks for work: nothing waits.

    Args:
        buckets: number of buckets of the model.
        bits, margin, decay: see `AdaptiveScale`.

    Raises:
        UserError: `margin` is too large for so few bits.
    """

    def __init__(self, buckets: int, bits: int, margin: float | None, decay: float) -> None:
        self._scales = BucketScales(
            buckets=buckets,
            scale_per_distance=float(scale_per_distance(bits, margin)),
            decay=float(np.float32(decay)),
            doubles_estimate=bits > 4,
        )
        self._encodings = 0

    @property
    def estimate(self) -> Array:
        """Estimated largest distances, float32, shape (buckets,); 0 before the first encoding."""
        return self._scales.estimate

    @property
    def measures_next(self) -> bool:
        """Whether the next encoding looks at the model for its largest elements."""
        return self._encodings % REFRESH_ENCODINGS == 0

    def scales(self, x: Array, out: Array) -> None:
        """Write the scales for an encoding of `x` to `out`, float32, shape (buckets,)."""
        if self.measures_next:
            self._scales.measure(x)
        self._encodings += 1
        self._scales.next_scales(out)

    def observe(self, step: FusedStep, totals: Array) -> None:
        """Update the estimates after an exchange: after each delta, and after the partner's model.

        Args:
            step: the exchange that was asked for.
            totals: receives its totals, float64, shape (`scale.TOTALS`,).
        """
        partner_model = step.partner_model
        self._scales.learn(
            ScaleUpdate(
                totals,
                step.delta_stats,
                [delta.scales for delta in step.deltas],
                step.weight,
                step.stats,
                None if partner_model is None else partner_model.scales,
            )
        )
