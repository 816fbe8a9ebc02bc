"""The lattice codec in NumPy: oracle of all other backends, and fallback without a compiler.

Every line is the same rounded operation as in ``lattice_math.h``; the results agree bit for bit.
"""

from __future__ import annotations

import numpy as np

from mpi_dasgd.kernels import optimizer_reference
from mpi_dasgd.kernels.encoded import BUCKET, EncodedVector, FusedStep, buckets_of, codes_of

__all__ = ["POSITION_WEIGHTS", "bucket_keys", "checksum", "dither", "run"]

_BLOCK = 64  # buckets at a time: the temporaries stay in the caches
_U32, _F32, _I32 = np.uint32, np.float32, np.int32
_MAGIC = _F32(12582912.0)  # 1.5 * 2^23


def run(step: FusedStep, first_bucket: int = 0) -> None:
    """Do `step`; `mpi_dasgd.kernels.lattice` has the formulas.

    Args:
        step: arrays to work on, and what to do.
        first_bucket: index of the step's first bucket in the message that its arrays are part of;
            dither and checksums depend on it.
    """
    with np.errstate(
        all="ignore"
    ):  # a diverging model is no reason to warn: its bucket is rejected
        for first in range(0, buckets_of(step.x.size), _BLOCK):
            _Block(step, first, first_bucket).run()


class _Block:
    """Some buckets of a step; arrays have the shape (buckets, `BUCKET`)."""

    def __init__(self, step: FusedStep, first: int, offset: int) -> None:
        self.step = step
        self.buckets = slice(first, min(first + _BLOCK, buckets_of(step.x.size)))
        self.elements = slice(first * BUCKET, min((first + _BLOCK) * BUCKET, step.x.size))
        numbers = np.arange(self.buckets.start, self.buckets.stop, dtype=np.uint64)
        self.numbers = numbers + np.uint64(offset)

    def run(self) -> None:
        step = self.step
        if step.optimizer is not None:
            optimizer_reference.update(step.optimizer, step.x[self.elements], self.elements.start)
        y = self._load(step.x)
        for delta, stats in zip(
            step.deltas, step.delta_stats or [None] * len(step.deltas), strict=True
        ):
            y = self._apply(y, delta, stats)
        if step.partner_model is not None:
            average = self._merge if step.merge else self._exchange
            y = average(y, step.partner_model)
        step.x[self.elements] = y.reshape(-1)[: self.elements.stop - self.elements.start]
        if step.publication is not None:
            self._encode(y, step.publication)

    def _load(self, vector: np.ndarray) -> np.ndarray:
        part = vector[self.elements]
        y = np.zeros((self.numbers.size, BUCKET), _F32)
        y.reshape(-1)[: part.size] = part
        return y

    def _encode(self, x: np.ndarray, out: EncodedVector) -> None:
        scale = out.scales[self.buckets]
        key = bucket_keys(out.seed, self.numbers)
        z = _round(x * _inverse(scale), None if out.nearest else key)
        valid = _in_range(z) & _scale_ok(scale)
        right = checksum(_weighted(z, out.bits), scale, key)
        out.checksums[self.buckets] = np.where(valid, right, ~checksum(_U32(0), scale, key))
        z[~valid] = 0  # every reader must reject it
        self._store(out, z)

    def _exchange(self, y: np.ndarray, partner_model: EncodedVector) -> np.ndarray:
        step = self.step
        scale = partner_model.scales[self.buckets]
        key = bucket_keys(partner_model.seed, self.numbers)
        m = _round(y * _inverse(scale), None if partner_model.nearest else key)
        d = _signed(self._codes(partner_model) - m, partner_model.bits)
        valid = self._valid(m, d, partner_model, scale, key)
        d[~valid] = 0
        unit = np.where(valid, _F32(step.weight) * scale, _F32(0))
        moved = y + unit[:, None] * d.astype(_F32)
        self._write_stats(step.stats, d, valid)
        reply = step.reply_delta
        if reply is not None:
            back = np.where(valid, -unit, _F32(0))
            self._store(reply, d.view(_U32))
            reply.scales[self.buckets] = back
            total = _weighted_words(self._stored(reply))
            reply_key = bucket_keys(reply.seed, self.numbers)
            reply.checksums[self.buckets] = checksum(total, back, reply_key)
        return np.where(valid[:, None], moved, y)

    def _apply(self, y: np.ndarray, delta: EncodedVector, stats: np.ndarray | None) -> np.ndarray:
        unit = delta.scales[self.buckets]
        d = _signed(self._codes(delta), delta.bits)
        total = _weighted_words(self._stored(delta))
        expected = checksum(total, unit, bucket_keys(delta.seed, self.numbers))
        valid = (expected == delta.checksums[self.buckets]) & np.isfinite(unit)
        self._write_stats(stats, d, valid)
        return np.where(valid[:, None], y + unit[:, None] * d.astype(_F32), y)

    def _merge(self, y: np.ndarray, partner_model: EncodedVector) -> np.ndarray:
        step = self.step
        scale = partner_model.scales[self.buckets]
        key = bucket_keys(partner_model.seed, self.numbers)
        m = _round(y * _inverse(scale), None)
        d = _signed(self._codes(partner_model) - m, partner_model.bits)
        valid = self._valid(m, d, partner_model, scale, key)
        self._write_stats(step.stats, d, valid)
        decoded = (m + d.view(_U32)).view(_F32) - _MAGIC
        if step.merge == 2 and not partner_model.nearest:
            decoded = decoded - dither(key)
        other = scale[:, None] * decoded
        return np.where(valid[:, None], y + _F32(step.weight) * (other - y), y)

    def _valid(
        self,
        m: np.ndarray,
        d: np.ndarray,
        publication: EncodedVector,
        scale: np.ndarray,
        key: np.ndarray,
    ) -> np.ndarray:
        """Return for each bucket whether the points m + d are those that were published."""
        expected = checksum(_weighted(m + d.view(_U32), publication.bits), scale, key)
        return (expected == publication.checksums[self.buckets]) & _in_range(m) & _scale_ok(scale)

    def _write_stats(self, stats: np.ndarray | None, d: np.ndarray, valid: np.ndarray) -> None:
        if stats is None:
            return
        squares = np.square(d.astype(np.int64))
        out = stats[self.buckets]
        out["rejected"] = ~valid
        out["max_d2"] = np.where(valid, squares.max(1), 0)
        out["sum_d2"] = np.where(valid, squares.sum(1), 0)

    def _stored(self, encoded: EncodedVector) -> np.ndarray:
        """Return the codes of these buckets as they are stored."""
        return encoded.codes.reshape(-1, codes_of(BUCKET, encoded.bits))[self.buckets]

    def _codes(self, encoded: EncodedVector) -> np.ndarray:
        """Return the codes of these buckets as uint32, in the order of the elements."""
        codes = self._stored(encoded)
        if encoded.bits == 4:  # the layout is drawn in layout.h
            halves = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1, 2, 4, 128)
            codes = halves.swapaxes(1, 2).reshape(-1, BUCKET)
        return codes.astype(_U32)

    def _store(self, out: EncodedVector, codes: np.ndarray) -> None:
        if out.bits == 4:
            halves = (codes & _U32(15)).reshape(-1, 4, 2, 128)
            codes = (halves[:, :, 0] | halves[:, :, 1] << _U32(4)).reshape(-1, BUCKET // 2)
        self._stored(out)[:] = codes.astype(out.codes.dtype)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> _U32(16))
    x = x * _U32(0x7FEB352D)
    x = x ^ (x >> _U32(15))
    x = x * _U32(0x846CA68B)
    return x ^ (x >> _U32(16))


def bucket_keys(seed: int, buckets: np.ndarray) -> np.ndarray:
    """Return the keys of some buckets of the message made with `seed`, uint32, shape (buckets,).

    Args:
        seed: unsigned 64 bits.
        buckets: indices of the buckets, uint64.
    """
    low, high = (buckets & np.uint64(0xFFFFFFFF)).astype(_U32), (buckets >> np.uint64(32))
    key = _mix(np.array([(seed & 0xFFFFFFFF) ^ 0x9E3779B9], _U32))
    key = _mix(key + _U32(seed >> 32 & 0xFFFFFFFF))
    return _mix(_mix(key + low) + high.astype(_U32))


_POSITION = np.arange(BUCKET, dtype=_U32)
POSITION_WEIGHTS = (_mix((_POSITION & _U32(127)) + _U32(1)) | _U32(1)) * (
    _mix((_POSITION >> _U32(7)) + _U32(1001)) | _U32(1)
)
"""Checksum weights of the positions in a bucket, odd, uint32, shape (`BUCKET`,)."""


def dither(keys: np.ndarray) -> np.ndarray:
    """Return the dither of the buckets with these keys, float32, shape (buckets, `BUCKET`)."""
    bits = ((POSITION_WEIGHTS + keys[:, None]) >> _U32(9)) | _U32(0x3F800000)
    return bits.view(_F32) - _F32(1.5)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return (_F32(1) / scale)[:, None]


def _round(t: np.ndarray, key: np.ndarray | None) -> np.ndarray:
    """Return points, uint32; without `key` rounded to the nearest."""
    return ((t if key is None else t + dither(key)) + _MAGIC).view(_U32)


def _in_range(points: np.ndarray) -> np.ndarray:
    return np.bitwise_or.reduce(points ^ _U32(0x4B000000), axis=1) < _U32(0x00800000)


def _signed(a: np.ndarray, bits: int) -> np.ndarray:
    return (a << _U32(32 - bits)).view(_I32) >> _I32(32 - bits)


def _weighted(points: np.ndarray, bits: int) -> np.ndarray:
    """Return the weighted sum of a publication for its checksum, uint32, shape (buckets,)."""
    return ((points + (points >> _U32(bits))) * POSITION_WEIGHTS).sum(1, dtype=_U32)


def _weighted_words(stored: np.ndarray) -> np.ndarray:
    """Return the weighted sum of a delta for its checksum, uint32, shape (buckets,)."""
    words = np.ascontiguousarray(stored).view("<u4")
    return (words * POSITION_WEIGHTS[: words.shape[1]]).sum(1, dtype=_U32)


def checksum(total: np.ndarray | np.uint32, scale: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return checksums, uint32, shape (buckets,), of weighted sums, scales and keys of buckets."""
    return (total + _mix(scale.view(_U32) + _U32(0x632BE59B))) ^ keys


def _scale_ok(scale: np.ndarray) -> np.ndarray:
    return scale.view(_U32) - _U32(0x00800000) <= _U32(0x7E000000 - 0x00800000)
