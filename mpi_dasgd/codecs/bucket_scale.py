"""The scale of each bucket of a lattice codec, adapted to the distance between the models."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.codecs.native_state import ScaleStruct
from mpi_dasgd.errors import UserError

__all__ = ["REFRESH_ENCODINGS", "AdaptiveScale", "scale_per_distance"]

REFRESH_ENCODINGS = 64
"""Encodings between two measurements of the largest |x|."""

# Smallest scale, relative to the largest |x|: a finer one leaves too few codes, and float32 too few
# bits.
_FLOOR = 2.0**-21
# First guess of a distance, relative to the largest |x|.
_START = 2.0**-4
# Range of an estimate.
_MIN_ESTIMATE, _MAX_ESTIMATE = 1e-30, 1e30
# Largest ratio of scale to distance: see AdaptiveScale.
_MAX_SCALE_RATIO = 0.3


def scale_per_distance(bits: int, margin: float | None) -> np.float32:
    """Return the ratio of a bucket's scale to its estimate; see `AdaptiveScale`.

    Raises:
        UserError: `margin` is too large for so few bits.
    """
    levels = 2 ** (bits - 1) - 1
    if margin is None:
        margin = 3.0 if bits > 4 else 1.5
    if margin / levels > _MAX_SCALE_RATIO:
        raise UserError(
            f"codec.scale_margin: with {bits} bits expected at most "
            f"{_MAX_SCALE_RATIO * levels:g}, got {margin:g}: coarser codes drive the models "
            "apart; take a smaller margin or more bits"
        )
    return np.float32(margin / levels)


class AdaptiveScale:
    """Estimate, for each bucket, of the largest distance to another model, and the scale from it.

    After every exchange, seen from either side, ``estimate <- max(distance, decay * estimate)``.
    After a rejection the estimate becomes twice the larger of the old estimate and the distance
    implied by the rejected scale. The scale is ``margin * estimate / (2^(bits-1) - 1)``, so that
    models `margin` times as far apart as recently can still be decoded. The smallest scale is 2^-21
    of the largest element.

    Too small a scale costs rejected buckets, too large a one precision: see `docs/codecs.md`.
    Random rounding leaves the squared differences of two models at scale * |difference| after an
    average, so that with a scale above half of the largest difference averaging drives models
    apart: the scale must not exceed 0.3 of the estimate, which bounds `margin` by 2.1 for 4 bits.
    For the same reason, with 4 bits only the rejected scale is doubled, not the own estimate, which
    may be right: its noise would get other buckets rejected. And no rejection raises an estimate
    above 16 times the largest element of the model, or a rank whose model is NaN would drive those
    of the others apart without end.

    Args:
        elements: number of model elements.
        bits: bits per code.
        bucket: elements per bucket.
        margin: ratio of the decodable distance to the estimate, above 1; None: 3, or 1.5 with 4
            bits.
        decay: factor on the estimate per exchange, in (0, 1).

    Raises:
        UserError: `margin` is too large for so few bits.

    Attributes:
        estimate: estimated largest distances, float32, shape (buckets,); 0 before the first
            encoding. Always in the same memory.
        struct: state, which the native exchange changes, too.
    """

    def __init__(
        self, elements: int, bits: int, bucket: int, margin: float | None, decay: float
    ) -> None:
        buckets = -(-elements // bucket)
        self.estimate = np.zeros(buckets, np.float32)
        self._scale_per_distance = scale_per_distance(bits, margin)
        self._decay = np.float32(decay)
        self._starts = np.arange(0, elements, bucket)
        self._floor = np.zeros(buckets, np.float32)
        self._doubles_estimate = bits > 4
        self._last_scales = np.zeros(buckets, np.float32)
        self.struct = ScaleStruct(
            *(array.ctypes.data for array in (self.estimate, self._floor, self._last_scales)),
            buckets,
            0,
            REFRESH_ENCODINGS,
            self._scale_per_distance,
            self._decay,
            _MAX_ESTIMATE,
            self._doubles_estimate,
        )

    @property
    def _max_estimate(self) -> np.float32:
        return np.float32(self.struct.max_estimate)

    @property
    def measures_next(self) -> bool:
        """Whether the next encoding looks at the model for its largest elements."""
        return self.struct.encodings % REFRESH_ENCODINGS == 0

    def scales(self, x: np.ndarray, out: np.ndarray) -> None:
        """Write the scales for an encoding of `x` to `out`, float32, shape (buckets,)."""
        if self.measures_next:
            self._refresh_range(x)
        self.struct.encodings += 1
        np.multiply(self.estimate, self._scale_per_distance, out=out)
        np.maximum(out, self._floor, out=out)
        self._last_scales[:] = out

    def _refresh_range(self, x: np.ndarray) -> None:
        if not x.size:
            return
        largest = np.maximum(
            np.maximum.reduceat(x, self._starts), -np.minimum.reduceat(x, self._starts)
        )
        largest = np.nan_to_num(largest, nan=0.0, posinf=0.0, neginf=0.0)
        np.maximum(largest * np.float32(_FLOOR), np.float32(_MIN_ESTIMATE), out=self._floor)
        overall = largest.max() or np.float32(1.0)  # all elements may be 0 at the start
        self.struct.max_estimate = float(16 * overall)
        if not self.estimate.any():
            guess = np.where(largest > 0, largest, overall) * np.float32(_START)
            self.estimate[:] = np.clip(guess, _MIN_ESTIMATE, _MAX_ESTIMATE)

    def observe(
        self,
        distance: np.ndarray,
        rejected: np.ndarray | None = None,
        scales: np.ndarray | None = None,
    ) -> None:
        """Update the estimates after an exchange; all arrays have the shape (buckets,).

        Args:
            distance: largest distance in each bucket, float32; 0 where it is unknown.
            rejected: whether each bucket could not be decoded, bool; None if all could.
            scales: scales of the publication that was decoded, float32; None for the last ones
                that `scales` wrote.
        """
        estimate = self.estimate
        estimate *= self._decay
        np.maximum(distance, estimate, out=estimate)
        if rejected is not None:
            implied = (self._last_scales if scales is None else scales)[
                rejected
            ] / self._scale_per_distance
            own = estimate[rejected] / self._decay
            base = np.fmax(implied, own) if self._doubles_estimate else implied
            estimate[rejected] = np.fmax(own, np.fmin(2 * base, self._max_estimate))
