"""The scale of each bucket of a lattice codec, adapted to the distance between the models."""

from __future__ import annotations

import numpy as np

from mpi_dasgd.errors import UserError

__all__ = ["AdaptiveScale"]

_FLOOR = (
    2.0**-21
)  # of the largest |x|: finer than this the code has no room, and float32 few bits left
_START = 2.0**-4  # of the largest |x|: first guess of a distance
_REFRESH_ENCODINGS = 64  # encodings between two looks at the largest |x|
_LEAST, _MOST = 1e-30, 1e30  # of an estimate
_COARSEST = 0.3  # largest scale over distance: see AdaptiveScale


class AdaptiveScale:
    """Keeps, for each bucket, an estimate of the largest distance to another model.

    ``estimate <- max(distance, rho * estimate)`` after every exchange, seen from either side; where a bucket
    was rejected, twice the larger of it and of that which the rejected scale stood for. The scale is
    ``gamma * estimate / (2^(b-1) - 1)``, so that models `gamma` times as far apart as lately can still be
    decoded. The floor is 2^-21 of the largest element.

    Too small a scale costs rejected buckets, too large a one precision: see `docs/codecs.md`. Rounding at
    random leaves the squares of two models' differences at scale * |difference| after an average, so that
    with a scale above half of the largest difference averaging drives models apart: the scale must
    not exceed 0.3 of the estimate, which bounds `gamma` by 2.1 for 4 bits. For the same reason with 4 bits
    only the rejected scale is doubled, not the own estimate, which may be right: its noise would get others
    rejected. And no rejection raises an estimate above 16 times the largest element of the model, or a rank
    whose model is NaN would drive those of the others apart without end.

    Args:
        elements: length of the model.
        bits: b.
        bucket: elements of a bucket.
        gamma: margin, above 1; None: 3, or 1.5 with 4 bits.
        rho: how fast the estimate falls, in (0, 1).

    Raises:
        UserError: `gamma` is too large for so few bits.

    Attributes:
        estimate: float32, shape (buckets,); 0 before the first encoding.
    """

    def __init__(
        self, elements: int, bits: int, bucket: int, gamma: float | None, rho: float
    ) -> None:
        levels = 2 ** (bits - 1) - 1
        if gamma is None:
            gamma = 3.0 if bits > 4 else 1.5
        if gamma / levels > _COARSEST:
            raise UserError(
                f"codec.scale_margin: with {bits} bits expected at most {_COARSEST * levels:g}, got "
                f"{gamma:g}: coarser codes drive the models apart; take a smaller margin or more bits"
            )
        buckets = -(-elements // bucket)
        self.estimate = np.zeros(buckets, np.float32)
        self._factor = np.float32(gamma / levels)
        self._rho = np.float32(rho)
        self._starts = np.arange(0, elements, bucket)
        self._floor = np.zeros(buckets, np.float32)
        self._doubles = bits > 4
        self._most = np.float32(_MOST)
        self._last = np.zeros(buckets, np.float32)
        self._encodings = 0

    def scales(self, x: np.ndarray, out: np.ndarray) -> None:
        """Write the scales for an encoding of `x` to `out`, float32, shape (buckets,)."""
        if self._encodings % _REFRESH_ENCODINGS == 0:
            self._refresh_range(x)
        self._encodings += 1
        np.multiply(self.estimate, self._factor, out=out)
        np.maximum(out, self._floor, out=out)
        self._last[:] = out

    def _refresh_range(self, x: np.ndarray) -> None:
        if not x.size:
            return
        largest = np.maximum(
            np.maximum.reduceat(x, self._starts), -np.minimum.reduceat(x, self._starts)
        )
        largest = np.nan_to_num(largest, nan=0.0, posinf=0.0, neginf=0.0)
        np.maximum(largest * np.float32(_FLOOR), np.float32(_LEAST), out=self._floor)
        anywhere = largest.max() or np.float32(1.0)  # a model may start at 0
        self._most = 16 * anywhere
        if not self.estimate.any():
            guess = np.where(largest > 0, largest, anywhere) * np.float32(_START)
            self.estimate[:] = np.clip(guess, _LEAST, _MOST)

    def observe(
        self,
        distance: np.ndarray,
        rejected: np.ndarray | None = None,
        scales: np.ndarray | None = None,
    ) -> None:
        """Take in what an exchange has shown; all arrays have the shape (buckets,).

        Args:
            distance: largest distance in each bucket, float32; 0 where unknown.
            rejected: whether the bucket could not be decoded; None if all could.
            scales: of the publication that was decoded; None: the last that were made here.
        """
        estimate = self.estimate
        estimate *= self._rho
        np.maximum(distance, estimate, out=estimate)
        if rejected is not None:
            stood_for = (self._last if scales is None else scales)[rejected] / self._factor
            own = estimate[rejected] / self._rho
            base = np.fmax(stood_for, own) if self._doubles else stood_for
            estimate[rejected] = np.fmax(own, np.fmin(2 * base, self._most))
