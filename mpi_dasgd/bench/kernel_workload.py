"""What `bench kernel` works on: models and messages, every operation of the codec, and a check of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels import lattice, reference
from mpi_dasgd.kernels.encoded import (
    BUCKET,
    BUCKET_STATS,
    Array,
    EncodedVector,
    FusedStep,
    buckets_of,
    codes_of,
)

__all__ = ["OPERATIONS", "KernelWorkload", "Models", "Operation"]

_DISTANCE = 1e-3  # of the models, in each element at most
_RUBBISH = 77  # where results will be
_BLOCK = 64  # buckets that are compared at a time
_CHECKED = 16  # blocks that are compared with the reference; all of a small model


class Models:
    """A model, what changes it, and a place to work on it, in the memory of one device.

    Args:
        origin: float32, host memory: what `x` is set to by `restore`.
        gradient: float32, host memory.
        xp: NumPy or CuPy.
    """

    def __init__(self, origin: np.ndarray, gradient: np.ndarray, xp: ModuleType = np) -> None:
        self.origin, self.host_gradient, self.xp = origin, gradient, xp
        self.gradient = xp.asarray(gradient)
        self.x, self.velocity = (xp.empty(origin.size, np.float32) for _ in range(2))

    @classmethod
    def make(cls, elements: int) -> Models:
        """Return models of any numbers, in host memory."""
        rng = np.random.default_rng(elements)
        return cls(_uniform(rng, elements, 0.1), _uniform(rng, elements, 0.01))

    def restore(self) -> None:
        """Set the model back to the beginning."""
        self.x[:] = self.xp.asarray(self.origin)


def _uniform(rng: np.random.Generator, elements: int, limit: float) -> np.ndarray:
    values = rng.random(elements, np.float32)
    values -= np.float32(0.5)
    values *= np.float32(2 * limit)
    return values


class KernelWorkload:
    """Arrays of one device for all operations with one number of bits.

    Args:
        models: of this device; shared with other numbers of bits.
        partner_model: publication of a partner, in host memory.
        delta: of a partner, in host memory.
        threads: of every step.
    """

    def __init__(
        self, models: Models, partner_model: EncodedVector, delta: EncodedVector, threads: int = 1
    ) -> None:
        self.models, self.threads = models, threads
        self.elements, self.bits = models.origin.size, partner_model.bits
        self.received = (partner_model, delta)
        self.partner_model, self.delta = (self._here(encoded) for encoded in self.received)
        xp = models.xp
        self.reply_delta = EncodedVector.empty(self.elements, self.bits, 3, xp=xp)
        self.publication = p = EncodedVector.empty(self.elements, self.bits, 4, xp=xp)
        p.scales[:] = self.partner_model.scales
        self.nearest = EncodedVector(
            self.elements, self.bits, p.codes, p.scales, p.checksums, 5, nearest=True
        )
        self.stats, self.delta_stats = (
            xp.zeros(buckets_of(self.elements) * BUCKET_STATS.itemsize, np.uint8).view(BUCKET_STATS)
            for _ in range(2)
        )
        self.restore()

    @classmethod
    def make(cls, models: Models, bits: int, threads: int = 1) -> KernelWorkload:
        """Return the work in host memory; other devices take theirs from it."""
        elements = models.origin.size
        partner_model = EncodedVector.empty(elements, bits, 1)
        # Both sides of an exchange stay within reach, even with a delta absorbed before.
        partner_model.scales[:] = 4 * _DISTANCE / (2 ** (bits - 1) - 3)
        partner = _uniform(np.random.default_rng(bits), elements, _DISTANCE)
        partner += models.origin
        lattice.encode(partner, partner_model, threads=threads)
        delta = EncodedVector.empty(elements, bits, 2)
        partner[:] = models.origin
        lattice.exchange(partner, partner_model, 0.5, delta, threads=threads)
        return cls(models, partner_model, delta, threads)

    def on(self, models: Models) -> KernelWorkload:
        """Return the same work on another device, where `models` lie."""
        return KernelWorkload(models, *self.received)

    def restore(self) -> None:
        """Set everything that operations change back to the beginning, and results to rubbish."""
        self.models.restore()
        self.models.velocity[:] = self.models.x
        for message in (self.reply_delta, self.publication):
            message.codes[:] = _RUBBISH
            message.checksums[:] = _RUBBISH
        self.reply_delta.scales[:] = _RUBBISH
        for stats in (self.stats, self.delta_stats):
            stats.view(np.uint32)[:] = _RUBBISH

    def step(self) -> FusedStep:
        """Return a step that does nothing yet."""
        return FusedStep(self.models.x, self.threads)

    def check(self, operation: Operation, without: str = "") -> None:
        """Compare all results of an operation on restored arrays with the reference, bit for bit.

        Args:
            operation: what was done, once.
            without: name of results that may differ.

        Raises:
            MpiDasgdError: the results are wrong.
        """
        computed = {name: _host(array) for name, array, _ in self._results()}
        for first in self._blocks():
            part = self._part(first)
            step = operation.step(part)
            reference.run(step, first_bucket=first)
            for name, expected, items in part._results():
                here = computed[name][first * items : first * items + expected.size]
                if name != without and expected.tobytes() != here.tobytes():
                    raise MpiDasgdError(
                        f"{name} is wrong from bucket {first} on: other bits than the NumPy reference's"
                    )
            if step.partner_model is not None and part.stats["rejected"].any():
                raise MpiDasgdError(f"buckets from {first} on were rejected: the data is no good")

    def check_sound(self) -> None:
        """Make sure that no bucket was rejected in what was done last.

        Raises:
            MpiDasgdError: one was.
        """
        rejected = _host(self.stats)["rejected"] == 1
        if rejected.any():
            raise MpiDasgdError(f"{rejected.sum()} buckets were rejected while time was taken")

    def _blocks(self) -> list[int]:
        """Return first buckets of the blocks to compare: among them the first and the last ones."""
        firsts = range(0, buckets_of(self.elements), _BLOCK)
        if len(firsts) <= _CHECKED:
            return list(firsts)
        rng = np.random.default_rng()
        return [0, firsts[-1], *rng.choice(firsts[1:-1], _CHECKED - 2, replace=False).tolist()]

    def _part(self, first: int) -> KernelWorkload:
        """Return the work on the buckets of one block, on copies in host memory."""
        here = slice(first * BUCKET, (first + _BLOCK) * BUCKET)
        models = Models(self.models.origin[here], self.models.host_gradient[here])
        partner_model, delta = (
            _part(encoded, first, models.origin.size) for encoded in self.received
        )
        return KernelWorkload(models, partner_model, delta)

    def _here(self, encoded: EncodedVector) -> EncodedVector:
        copy = self.models.xp.asarray
        codes, scales, checksums = (
            copy(encoded.codes),
            copy(encoded.scales),
            copy(encoded.checksums),
        )
        return EncodedVector(
            encoded.elements, encoded.bits, codes, scales, checksums, encoded.seed, encoded.nearest
        )

    def _results(self) -> Iterator[tuple[str, Array, int]]:
        """Yield everything that operations write: name, array, and its items in a bucket."""
        yield "x", self.models.x, BUCKET
        yield "velocity", self.models.velocity, BUCKET
        yield "stats", self.stats, 1
        yield "delta_stats", self.delta_stats, 1
        for name in ("reply_delta", "publication"):
            message = getattr(self, name)
            yield f"{name}.codes", message.codes, codes_of(BUCKET, self.bits)
            yield f"{name}.scales", message.scales, 1
            yield f"{name}.checksums", message.checksums, 1


def _part(encoded: EncodedVector, first: int, elements: int) -> EncodedVector:
    items, buckets = codes_of(BUCKET, encoded.bits), buckets_of(elements)
    here = slice(first, first + buckets)
    codes = encoded.codes[first * items : (first + buckets) * items]
    return EncodedVector(
        elements, encoded.bits, codes, encoded.scales[here], encoded.checksums[here], encoded.seed
    )


def _host(array: Any) -> np.ndarray:
    """Return an array as NumPy's; the one of statistics goes as bytes."""
    if isinstance(array, np.ndarray):
        return array
    return array.view(np.uint8).get().view(array.dtype)


@dataclass(frozen=True)
class Operation:
    """Something that the codec does.

    Attributes:
        floats: bytes of float32 that it reads and writes, an element.
        codes: how many arrays of codes it reads or writes.
        parts: makes it of a step that does nothing yet.
    """

    floats: int
    codes: int
    parts: Callable[[KernelWorkload, FusedStep], None]

    def traffic(self, bits: int) -> float:
        """Bytes that it reads and writes, an element; without scales and checksums, .008 more."""
        return self.floats + self.codes * bits / 8

    def step(self, work: KernelWorkload) -> FusedStep:
        """Return it as a step on the arrays of `work`."""
        step = work.step()
        self.parts(work, step)
        step.validate()
        return step


def _encode(work: KernelWorkload, step: FusedStep) -> None:
    step.publication = work.publication


def _encode_nearest(work: KernelWorkload, step: FusedStep) -> None:
    step.publication = work.nearest


def _apply(work: KernelWorkload, step: FusedStep) -> None:
    step.deltas, step.delta_stats = (work.delta,), (work.delta_stats,)


def _exchange(work: KernelWorkload, step: FusedStep) -> None:
    step.partner_model, step.stats, step.reply_delta = (
        work.partner_model,
        work.stats,
        work.reply_delta,
    )


def _merge(work: KernelWorkload, step: FusedStep) -> None:
    step.partner_model, step.stats, step.merge = work.partner_model, work.stats, 1


def _merge_subtract(work: KernelWorkload, step: FusedStep) -> None:
    _merge(work, step)
    step.merge = 2


def _merge_forward(work: KernelWorkload, step: FusedStep) -> None:
    _merge(work, step)
    _encode(work, step)


def _sgd_encode(work: KernelWorkload, step: FusedStep) -> None:
    step.velocity, step.gradient = work.models.velocity, work.models.gradient
    step.lr, step.momentum, step.weight_decay = 1e-3, 0.9, 1e-4
    _encode(work, step)


def _fused(work: KernelWorkload, step: FusedStep) -> None:
    _apply(work, step)
    _exchange(work, step)
    _encode(work, step)


OPERATIONS = {
    "encode": Operation(4, 1, _encode),
    "encode_nearest": Operation(4, 1, _encode_nearest),
    "apply": Operation(8, 1, _apply),
    "exchange": Operation(8, 2, _exchange),
    "merge": Operation(8, 1, _merge),
    "merge_subtract": Operation(8, 1, _merge_subtract),
    "merge_forward": Operation(8, 2, _merge_forward),
    "sgd_encode": Operation(20, 1, _sgd_encode),
    "fused": Operation(8, 4, _fused),
}
