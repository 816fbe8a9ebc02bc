"""Operations of the lattice codec for `bench kernel`: their arrays and a check of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.bench.kernel_models import Models, uniform
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
from mpi_dasgd.kernels.optimizer import (
    GROUP,
    SEGMENT,
    Group,
    OptimizerStep,
    adam_group,
    sgd_group,
)

__all__ = ["OPERATIONS", "POISON", "KernelWorkload", "Operation"]

POISON = 77
"""Value of every result before an operation, so that the check finds what was not written."""

# Largest distance between an element of the model and the partner's.
_DISTANCE = 1e-3
# Buckets that are compared at a time.
_BLOCK = 64
# Blocks that are compared with the reference; a small model is compared as a whole.
_CHECKED_BLOCKS = 16


class KernelWorkload:
    """Arrays on one device for all operations with one number of bits per code.

    Args:
        models: models on the device; workloads with other numbers of bits may share them.
        partner_model: publication of a partner, in host memory.
        delta: delta of a partner, in host memory.
        threads: number of CPU threads of every operation.

    Attributes:
        elements, bits: length of the model, and bits per code.
        received: `partner_model` and `delta` in host memory.
        partner_model, delta: their copies on the device.
        reply_delta, publication: messages that operations write.
        nearest: `publication`, but rounded to the nearest.
        stats, delta_stats: statistics that operations write, `BUCKET_STATS`, shape (buckets,).
    """

    def __init__(
        self, models: Models, partner_model: EncodedVector, delta: EncodedVector, threads: int = 1
    ) -> None:
        self.models, self.threads = models, threads
        self.elements, self.bits = models.origin.size, partner_model.bits
        self.received = (partner_model, delta)
        self.partner_model, self.delta = (self._to_device(encoded) for encoded in self.received)
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
        """Return a workload in host memory, with messages from a random partner near `models`."""
        elements = models.origin.size
        partner_model = EncodedVector.empty(elements, bits, 1)
        # Both sides of an exchange stay within reach, even with a delta absorbed before.
        partner_model.scales[:] = 4 * _DISTANCE / (2 ** (bits - 1) - 3)
        partner = uniform(np.random.default_rng(bits), elements, _DISTANCE)
        partner += models.origin
        lattice.encode(partner, partner_model, threads=threads)
        delta = EncodedVector.empty(elements, bits, 2)
        partner[:] = models.origin
        lattice.exchange(partner, partner_model, 0.5, delta, threads=threads)
        return cls(models, partner_model, delta, threads)

    def on(self, models: Models) -> KernelWorkload:
        """Return the same workload on the device of `models`."""
        return KernelWorkload(models, *self.received)

    def restore(self) -> None:
        """Reset everything that operations change; results are filled with `POISON`."""
        self.models.restore()
        self.models.restore_state()
        for message in (self.reply_delta, self.publication):
            message.codes[:] = POISON
            message.checksums[:] = POISON
        self.reply_delta.scales[:] = POISON
        for stats in (self.stats, self.delta_stats):
            stats.view(np.uint32)[:] = POISON

    def empty_step(self) -> FusedStep:
        """Return a step on the model that does nothing yet."""
        return FusedStep(self.models.x, self.threads)

    def check(self, operation: Operation, ignored: str = "") -> None:
        """Compare all results of an operation with the NumPy reference, bit for bit.

        The operation must have run once since `restore`.

        Args:
            operation: operation whose results are compared.
            ignored: name of a result that may differ; empty for none.

        Raises:
            MpiDasgdError: a result is wrong, or the data made buckets fail.
        """
        computed = {name: _to_host(array) for name, array, _ in self.results()}
        for first in self._checked_blocks():
            block = self._block(first)
            step = operation.step(block)
            reference.run(step, first_bucket=first)
            for name, expected, items in block.results():
                actual = computed[name][first * items : first * items + expected.size]
                if name != ignored and expected.tobytes() != actual.tobytes():
                    raise MpiDasgdError(
                        f"{name} is wrong from bucket {first} on: other bits than the NumPy "
                        "reference's"
                    )
            if step.partner_model is not None and block.stats["rejected"].any():
                raise MpiDasgdError(f"buckets from {first} on were rejected: the data is no good")

    def check_none_rejected(self) -> None:
        """Require that the last operation rejected no bucket.

        Raises:
            MpiDasgdError: a bucket was rejected.
        """
        rejected = _to_host(self.stats)["rejected"] == 1
        if rejected.any():
            raise MpiDasgdError(f"{rejected.sum()} buckets were rejected while time was taken")

    def results(self) -> Iterator[tuple[str, Array, int]]:
        """Yield name, array and items per bucket of everything that operations write."""
        yield "x", self.models.x, BUCKET
        yield "first", self.models.first, BUCKET
        yield "second", self.models.second, BUCKET
        yield "stats", self.stats, 1
        yield "delta_stats", self.delta_stats, 1
        for name in ("reply_delta", "publication"):
            message = getattr(self, name)
            yield f"{name}.codes", message.codes, codes_of(BUCKET, self.bits)
            yield f"{name}.scales", message.scales, 1
            yield f"{name}.checksums", message.checksums, 1

    def _checked_blocks(self) -> list[int]:
        """Return the first buckets of the blocks to compare: first, last and random blocks."""
        firsts = range(0, buckets_of(self.elements), _BLOCK)
        if len(firsts) <= _CHECKED_BLOCKS:
            return list(firsts)
        middle = np.random.default_rng().choice(firsts[1:-1], _CHECKED_BLOCKS - 2, replace=False)
        return [0, firsts[-1], *middle.tolist()]

    def _block(self, first: int) -> KernelWorkload:
        """Return the workload of the block that begins with bucket `first`, in host memory."""
        elements = slice(first * BUCKET, (first + _BLOCK) * BUCKET)
        models = Models(self.models.origin[elements], self.models.host_gradient[elements])
        partner_model, delta = (
            _encoded_block(encoded, first, models.origin.size) for encoded in self.received
        )
        return KernelWorkload(models, partner_model, delta)

    def _to_device(self, encoded: EncodedVector) -> EncodedVector:
        copy = self.models.xp.asarray
        return EncodedVector(
            encoded.elements,
            encoded.bits,
            copy(encoded.codes),
            copy(encoded.scales),
            copy(encoded.checksums),
            encoded.seed,
            encoded.nearest,
        )


def _encoded_block(encoded: EncodedVector, first: int, elements: int) -> EncodedVector:
    """Return the part of an encoded vector from bucket `first` on, as views."""
    items, buckets = codes_of(BUCKET, encoded.bits), buckets_of(elements)
    return EncodedVector(
        elements,
        encoded.bits,
        encoded.codes[first * items : (first + buckets) * items],
        encoded.scales[first : first + buckets],
        encoded.checksums[first : first + buckets],
        encoded.seed,
    )


def _to_host(array: Array) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    # Copied as bytes, because the dtype of the statistics is structured.
    host: np.ndarray = array.view(np.uint8).get().view(array.dtype)
    return host


@dataclass(frozen=True)
class Operation:
    """One operation of the codec.

    Attributes:
        float_bytes: bytes of float32 that it reads and writes, per element.
        code_arrays: number of arrays of codes that it reads or writes.
        fill: adds the operation to a step that does nothing yet.
    """

    float_bytes: int
    code_arrays: int
    fill: Callable[[KernelWorkload, FusedStep], None]

    def traffic(self, bits: int) -> float:
        """Return the bytes read and written per element; scales and checksums add 0.008."""
        return self.float_bytes + self.code_arrays * bits / 8

    def step(self, workload: KernelWorkload) -> FusedStep:
        """Return the operation as a step on the arrays of a workload."""
        step = workload.empty_step()
        self.fill(workload, step)
        step.validate()
        return step


def _encode(workload: KernelWorkload, step: FusedStep) -> None:
    step.publication = workload.publication


def _encode_nearest(workload: KernelWorkload, step: FusedStep) -> None:
    step.publication = workload.nearest


def _apply(workload: KernelWorkload, step: FusedStep) -> None:
    step.deltas = (workload.delta,)
    step.delta_stats = (workload.delta_stats,)


def _exchange(workload: KernelWorkload, step: FusedStep) -> None:
    step.partner_model = workload.partner_model
    step.stats = workload.stats
    step.reply_delta = workload.reply_delta


def _merge(workload: KernelWorkload, step: FusedStep) -> None:
    step.partner_model = workload.partner_model
    step.stats = workload.stats
    step.merge = 1


def _merge_subtract(workload: KernelWorkload, step: FusedStep) -> None:
    _merge(workload, step)
    step.merge = 2


def _merge_forward(workload: KernelWorkload, step: FusedStep) -> None:
    _merge(workload, step)
    _encode(workload, step)


def _sgd(workload: KernelWorkload, step: FusedStep) -> None:
    step.optimizer = _optimizer(workload, sgd_group(1e-6, 0.9, 0.0, 1e-4))


def _adamw(workload: KernelWorkload, step: FusedStep) -> None:
    group = adam_group(1e-7, (0.9, 0.999), 1e-8, 1e-2, 100, decoupled=True)
    step.optimizer = _optimizer(workload, group, workload.models.second)


def _optimizer(
    workload: KernelWorkload, group: Group, second: Array | None = None
) -> OptimizerStep:
    gradient = workload.models.gradient
    on_host = isinstance(gradient, np.ndarray)
    segments = np.zeros(1, SEGMENT)
    segments["count"] = workload.elements
    segments["gradient"] = gradient.ctypes.data if on_host else gradient.data.ptr
    step = OptimizerStep(segments, np.array([group], GROUP), workload.models.first, second)
    step.gradients = gradient
    return step


def _fused(workload: KernelWorkload, step: FusedStep) -> None:
    _apply(workload, step)
    _exchange(workload, step)
    _encode(workload, step)


def _sgd_fused(workload: KernelWorkload, step: FusedStep) -> None:
    _sgd(workload, step)
    _fused(workload, step)


def _adamw_fused(workload: KernelWorkload, step: FusedStep) -> None:
    _adamw(workload, step)
    _fused(workload, step)


OPERATIONS = {
    "encode": Operation(4, 1, _encode),
    "encode_nearest": Operation(4, 1, _encode_nearest),
    "apply": Operation(8, 1, _apply),
    "exchange": Operation(8, 2, _exchange),
    "merge": Operation(8, 1, _merge),
    "merge_subtract": Operation(8, 1, _merge_subtract),
    "merge_forward": Operation(8, 2, _merge_forward),
    "sgd": Operation(20, 0, _sgd),
    "adamw": Operation(28, 0, _adamw),
    "fused": Operation(8, 4, _fused),
    "sgd_fused": Operation(20, 4, _sgd_fused),
    "adamw_fused": Operation(28, 4, _adamw_fused),
}
"""All operations by name."""
