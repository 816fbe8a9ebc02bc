"""The lattice codec in NumPy: the oracle of all other backends, and what runs without a compiler.

Every line is the same rounded operation as in ``lattice.h``; the results agree bit for bit.
"""

from __future__ import annotations

import numpy as np

from mpi_dasgd.kernels.encoded import BUCKET, FOUND, Coded, Step, buckets_of

__all__ = ["run"]

_BLOCK = 64  # buckets at a time: the temporaries stay in the caches
_U32, _F32, _I32 = np.uint32, np.float32, np.int32
_RANGE = _U32(0x4A800000)  # bits of 2^22
_MAGIC = _F32(12582912.0)  # 1.5 * 2^23


def run(step: Step) -> None:
    """Do what `step` says; see `mpi_dasgd.kernels.lattice` for the meaning."""
    with np.errstate(all="ignore"):  # a diverging model is no reason to warn: its bucket is refused
        for first in range(0, buckets_of(step.x.size), _BLOCK):
            _Block(step, first).run()


class _Block:
    """Some buckets of a step; arrays have the shape (buckets, 1024)."""

    def __init__(self, step: Step, first: int) -> None:
        self.step = step
        self.buckets = slice(first, min(first + _BLOCK, buckets_of(step.x.size)))
        self.numbers = np.arange(self.buckets.start, self.buckets.stop, dtype=np.uint64)
        self.elements = slice(first * BUCKET, min((first + _BLOCK) * BUCKET, step.x.size))

    def run(self) -> None:
        step = self.step
        if step.velocity is not None:
            self._sgd()
        y = self._load(step.x)
        for delta, found in zip(
            step.arrived, step.arrived_found or [None] * len(step.arrived), strict=True
        ):
            y = self._apply(y, delta, found)
        if step.theirs is not None:
            y = self._merge(y, step.theirs) if step.merge else self._exchange(y, step.theirs)
        step.x[self.elements] = y.reshape(-1)[: self.elements.stop - self.elements.start]
        if step.published is not None:
            self._encode(y, step.published)

    def _load(self, vector: np.ndarray) -> np.ndarray:
        part = vector[self.elements]
        y = np.zeros((self.numbers.size, BUCKET), _F32)
        y.reshape(-1)[: part.size] = part
        return y

    def _sgd(self) -> None:
        step, here = self.step, self.elements
        assert step.velocity is not None and step.gradient is not None
        x, velocity = step.x[here], step.velocity[here]
        direction = step.gradient[here] + _F32(step.decay) * x
        velocity[:] = _F32(step.momentum) * velocity + direction
        x -= _F32(step.rate) * velocity

    def _encode(self, x: np.ndarray, out: Coded) -> None:
        scale = out.scales[self.buckets]
        key = _keys(out.seed, self.numbers)
        z = _round(x * _inverse(scale), None if out.nearest else key)
        sound = _in_range(z) & _usable(scale)
        check = _check(_weighted(z, out.bits), scale, key)
        out.checks[self.buckets] = np.where(sound, check, ~_check(_U32(0), scale, key))
        z[~sound] = 0  # every reader must reject it
        self._store(out, z)

    def _exchange(self, y: np.ndarray, theirs: Coded) -> np.ndarray:
        step = self.step
        scale = theirs.scales[self.buckets]
        key = _keys(theirs.seed, self.numbers)
        m = _round(y * _inverse(scale), None if theirs.nearest else key)
        d = _signed(self._codes(theirs) - m, theirs.bits)
        sound = self._sound(m, d, theirs, scale, key)
        d[~sound] = 0
        unit = np.where(sound, _F32(step.weight) * scale, _F32(0))
        moved = y + unit[:, None] * d.astype(_F32)
        self._note(step.found, d, sound)
        reply = step.reply
        if reply is not None:
            back = np.where(sound, -unit, _F32(0))
            self._store(reply, d.view(_U32))
            reply.scales[self.buckets] = back
            words = _weighted_words(self._stored(reply))
            reply.checks[self.buckets] = _check(words, back, _keys(reply.seed, self.numbers))
        return np.where(sound[:, None], moved, y)

    def _apply(self, y: np.ndarray, delta: Coded, found: np.ndarray | None) -> np.ndarray:
        unit = delta.scales[self.buckets]
        d = _signed(self._codes(delta), delta.bits)
        check = _check(_weighted_words(self._stored(delta)), unit, _keys(delta.seed, self.numbers))
        sound = (check == delta.checks[self.buckets]) & np.isfinite(unit)
        self._note(found, d, sound)
        return np.where(sound[:, None], y + unit[:, None] * d.astype(_F32), y)

    def _merge(self, y: np.ndarray, theirs: Coded) -> np.ndarray:
        step = self.step
        scale = theirs.scales[self.buckets]
        key = _keys(theirs.seed, self.numbers)
        m = _round(y * _inverse(scale), None)
        d = _signed(self._codes(theirs) - m, theirs.bits)
        sound = self._sound(m, d, theirs, scale, key)
        self._note(step.found, d, sound)
        decoded = (m + d.view(_U32)).view(_F32) - _MAGIC
        if step.merge == 2 and not theirs.nearest:
            decoded = decoded - _dither(key)
        other = scale[:, None] * decoded
        return np.where(sound[:, None], y + _F32(step.weight) * (other - y), y)

    def _sound(
        self, m: np.ndarray, d: np.ndarray, coded: Coded, scale: np.ndarray, key: np.ndarray
    ) -> np.ndarray:
        check = _check(_weighted(m + d.view(_U32), coded.bits), scale, key)
        return (check == coded.checks[self.buckets]) & _in_range(m) & _usable(scale)

    def _note(self, found: np.ndarray | None, d: np.ndarray, sound: np.ndarray) -> None:
        if found is None:
            return
        squares = np.square(d.astype(np.int64))
        here = found[self.buckets]
        here["rejected"] = ~sound
        here["max_d2"] = np.where(sound, squares.max(1), 0)
        here["sum_d2"] = np.where(sound, squares.sum(1), 0)

    def _stored(self, coded: Coded) -> np.ndarray:
        """Return the codes of these buckets as they are stored."""
        return coded.codes.reshape(-1, BUCKET // 2 if coded.bits == 4 else BUCKET)[self.buckets]

    def _codes(self, coded: Coded) -> np.ndarray:
        """Return the codes of these buckets as uint32, in the order of the elements."""
        codes = self._stored(coded)
        if coded.bits == 4:
            parts = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1, 2, 4, 128)
            codes = parts.swapaxes(1, 2).reshape(-1, BUCKET)
        return codes.astype(_U32)

    def _store(self, out: Coded, codes: np.ndarray) -> None:
        if out.bits == 4:
            parts = (codes & _U32(15)).reshape(-1, 4, 2, 128)
            codes = (parts[:, :, 0] | parts[:, :, 1] << _U32(4)).reshape(-1, BUCKET // 2)
        self._stored(out)[:] = codes.astype(out.codes.dtype)


assert FOUND.itemsize == 16, "as MpdFound in cpu/lattice.h"


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> _U32(16))
    x = x * _U32(0x7FEB352D)
    x = x ^ (x >> _U32(15))
    x = x * _U32(0x846CA68B)
    return x ^ (x >> _U32(16))


def _keys(seed: int, numbers: np.ndarray) -> np.ndarray:
    low, high = (numbers & np.uint64(0xFFFFFFFF)).astype(_U32), (numbers >> np.uint64(32))
    key = _mix(np.array([(seed & 0xFFFFFFFF) ^ 0x9E3779B9], _U32))
    key = _mix(key + _U32(seed >> 32 & 0xFFFFFFFF))
    return _mix(_mix(key + low) + high.astype(_U32))


_POSITION = np.arange(BUCKET, dtype=_U32)
_WEIGHTS = (_mix((_POSITION & _U32(127)) + _U32(1)) | _U32(1)) * (
    _mix((_POSITION >> _U32(7)) + _U32(1001)) | _U32(1)
)


def _dither(key: np.ndarray) -> np.ndarray:
    bits = ((_WEIGHTS + key[:, None]) >> _U32(9)) | _U32(0x3F800000)
    return bits.view(_F32) - _F32(1.5)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return (_F32(1) / scale)[:, None]


def _round(t: np.ndarray, key: np.ndarray | None) -> np.ndarray:
    """Return points, uint32; `key` None rounds to the nearest."""
    return ((t if key is None else t + _dither(key)) + _MAGIC).view(_U32)


def _in_range(points: np.ndarray) -> np.ndarray:
    return np.bitwise_or.reduce(points ^ _U32(0x4B000000), axis=1) < _U32(0x00800000)


def _signed(a: np.ndarray, bits: int) -> np.ndarray:
    return (a << _U32(32 - bits)).view(_I32) >> _I32(32 - bits)


def _weighted(points: np.ndarray, bits: int) -> np.ndarray:
    """Return the sum of the check of a publication, uint32, shape (buckets,)."""
    return ((points + (points >> _U32(bits))) * _WEIGHTS).sum(1, dtype=_U32)


def _weighted_words(stored: np.ndarray) -> np.ndarray:
    """Return the sum of the check of a delta, uint32, shape (buckets,)."""
    words = np.ascontiguousarray(stored).view("<u4")
    return (words * _WEIGHTS[: words.shape[1]]).sum(1, dtype=_U32)


def _check(total: np.ndarray | np.uint32, scale: np.ndarray, key: np.ndarray) -> np.ndarray:
    return (total + _mix(scale.view(_U32) + _U32(0x632BE59B))) ^ key


def _usable(scale: np.ndarray) -> np.ndarray:
    return scale.view(_U32) - _U32(0x00800000) <= _U32(0x7E000000 - 0x00800000)
