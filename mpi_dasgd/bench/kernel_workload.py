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
    FOUND,
    Array,
    Coded,
    Step,
    buckets_of,
    codes_of,
)

__all__ = ["OPERATIONS", "Models", "Operation", "Work"]

_DISTANCE = 1e-3  # of the models, in each element at most
_RUBBISH = 77  # where results will be
_CHECKED = 16  # blocks of 64 buckets that are compared with the reference; all of a small model


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


class Work:
    """Arrays of one device for all operations with one number of bits.

    Args:
        models: of this device; shared with other numbers of bits.
        theirs: publication of a partner, in host memory.
        delta: of a partner, in host memory.
        threads: of every step.
    """

    def __init__(self, models: Models, theirs: Coded, delta: Coded, threads: int = 1) -> None:
        self.models, self.threads = models, threads
        self.elements, self.bits = models.origin.size, theirs.bits
        self.received = (theirs, delta)
        self.theirs, self.delta = (self._here(coded) for coded in self.received)
        xp = models.xp
        self.reply = Coded.empty(self.elements, self.bits, 3, xp=xp)
        self.published = p = Coded.empty(self.elements, self.bits, 4, xp=xp)
        p.scales[:] = self.theirs.scales
        self.nearest = Coded(self.elements, self.bits, p.codes, p.scales, p.checks, 5, nearest=True)
        self.found, self.arrived_found = (
            xp.zeros(buckets_of(self.elements) * FOUND.itemsize, np.uint8).view(FOUND)
            for _ in range(2)
        )
        self.restore()

    @classmethod
    def make(cls, models: Models, bits: int, threads: int = 1) -> Work:
        """Return the work in host memory; other devices take theirs from it."""
        elements = models.origin.size
        theirs = Coded.empty(elements, bits, 1)
        # Both sides of an exchange stay within reach, even with a delta absorbed before.
        theirs.scales[:] = 4 * _DISTANCE / (2 ** (bits - 1) - 3)
        partner = _uniform(np.random.default_rng(bits), elements, _DISTANCE)
        partner += models.origin
        lattice.encode(partner, theirs, threads=threads)
        delta = Coded.empty(elements, bits, 2)
        partner[:] = models.origin
        lattice.exchange(partner, theirs, 0.5, delta, threads=threads)
        return cls(models, theirs, delta, threads)

    def on(self, models: Models) -> Work:
        """Return the same work on another device, where `models` lie."""
        return Work(models, *self.received)

    def restore(self) -> None:
        """Set everything that operations change back to the beginning, and results to rubbish."""
        self.models.restore()
        self.models.velocity[:] = self.models.x
        for message in (self.reply, self.published):
            message.codes[:] = _RUBBISH
            message.checks[:] = _RUBBISH
        self.reply.scales[:] = _RUBBISH
        for found in (self.found, self.arrived_found):
            found.view(np.uint32)[:] = _RUBBISH

    def step(self) -> Step:
        """Return a step that does nothing yet."""
        return Step(self.models.x, self.threads)

    def check(self, operation: Operation, without: str = "") -> None:
        """Compare all results of an operation on restored arrays with the reference, bit for bit.

        Args:
            operation: what was done, once.
            without: name of results that may differ.

        Raises:
            MpiDasgdError: the results are wrong.
        """
        found = {name: _host(array) for name, array, _ in self._results()}
        for first in self._blocks():
            part = self._part(first)
            step = operation.step(part)
            block = reference._Block(step, 0)
            block.numbers += np.uint64(first)
            with np.errstate(all="ignore"):
                block.run()
            for name, expected, items in part._results():
                here = found[name][first * items : first * items + expected.size]
                if name != without and expected.tobytes() != here.tobytes():
                    raise MpiDasgdError(
                        f"{name} is wrong from bucket {first} on: other bits than the NumPy reference's"
                    )
            if step.theirs is not None and part.found["rejected"].any():
                raise MpiDasgdError(f"buckets from {first} on were rejected: the data is no good")

    def check_sound(self) -> None:
        """Make sure that no bucket was rejected in what was done last.

        Raises:
            MpiDasgdError: one was.
        """
        rejected = _host(self.found)["rejected"] == 1
        if rejected.any():
            raise MpiDasgdError(f"{rejected.sum()} buckets were rejected while time was taken")

    def _blocks(self) -> list[int]:
        """Return first buckets of the blocks to compare: among them the first and the last ones."""
        size = reference._BLOCK
        firsts = range(0, buckets_of(self.elements), size)
        if len(firsts) <= _CHECKED:
            return list(firsts)
        rng = np.random.default_rng()
        return [0, firsts[-1], *rng.choice(firsts[1:-1], _CHECKED - 2, replace=False).tolist()]

    def _part(self, first: int) -> Work:
        """Return the work on the buckets of one block, on copies in host memory."""
        here = slice(first * BUCKET, (first + reference._BLOCK) * BUCKET)
        models = Models(self.models.origin[here], self.models.host_gradient[here])
        theirs, delta = (_part(coded, first, models.origin.size) for coded in self.received)
        return Work(models, theirs, delta)

    def _here(self, coded: Coded) -> Coded:
        copy = self.models.xp.asarray
        codes, scales, checks = copy(coded.codes), copy(coded.scales), copy(coded.checks)
        return Coded(coded.elements, coded.bits, codes, scales, checks, coded.seed, coded.nearest)

    def _results(self) -> Iterator[tuple[str, Array, int]]:
        """Yield everything that operations write: name, array, and its items in a bucket."""
        yield "x", self.models.x, BUCKET
        yield "velocity", self.models.velocity, BUCKET
        yield "found", self.found, 1
        yield "arrived_found", self.arrived_found, 1
        for name in ("reply", "published"):
            message = getattr(self, name)
            yield f"{name}.codes", message.codes, codes_of(BUCKET, self.bits)
            yield f"{name}.scales", message.scales, 1
            yield f"{name}.checks", message.checks, 1


def _part(coded: Coded, first: int, elements: int) -> Coded:
    items, buckets = codes_of(BUCKET, coded.bits), buckets_of(elements)
    here = slice(first, first + buckets)
    codes = coded.codes[first * items : (first + buckets) * items]
    return Coded(elements, coded.bits, codes, coded.scales[here], coded.checks[here], coded.seed)


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
    parts: Callable[[Work, Step], None]

    def traffic(self, bits: int) -> float:
        """Bytes that it reads and writes, an element; without scales and checks, .008 more."""
        return self.floats + self.codes * bits / 8

    def step(self, work: Work) -> Step:
        """Return it as a step on the arrays of `work`."""
        step = work.step()
        self.parts(work, step)
        step.check()
        return step


def _encode(work: Work, step: Step) -> None:
    step.published = work.published


def _encode_nearest(work: Work, step: Step) -> None:
    step.published = work.nearest


def _apply(work: Work, step: Step) -> None:
    step.arrived, step.arrived_found = (work.delta,), (work.arrived_found,)


def _exchange(work: Work, step: Step) -> None:
    step.theirs, step.found, step.reply = work.theirs, work.found, work.reply


def _merge(work: Work, step: Step) -> None:
    step.theirs, step.found, step.merge = work.theirs, work.found, 1


def _merge_subtract(work: Work, step: Step) -> None:
    _merge(work, step)
    step.merge = 2


def _merge_forward(work: Work, step: Step) -> None:
    _merge(work, step)
    _encode(work, step)


def _sgd_encode(work: Work, step: Step) -> None:
    step.velocity, step.gradient = work.models.velocity, work.models.gradient
    step.rate, step.momentum, step.decay = 1e-3, 0.9, 1e-4
    _encode(work, step)


def _fused(work: Work, step: Step) -> None:
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
