"""Arguments of all backends: vectors in lattice codes, and a fused pass over a model."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.optimizer_step import GROUP, SEGMENT, OptimizerStep

__all__ = [
    "BITS",
    "BUCKET",
    "BUCKET_STATS",
    "CACHE_BLOCK",
    "EncodedVector",
    "EncodedVectorStruct",
    "FusedStep",
    "buckets_of",
    "code_dtype",
    "codes_of",
]

BITS = (4, 8, 16)
BUCKET = 1024
"""Elements that share a scale and a checksum; models are padded to a multiple of it.

``layout.h`` has the same constant; a test asks the library for it."""

CACHE_BLOCK = 16 * BUCKET
"""Elements that NumPy loops process at a time: five float32 blocks stay in a 1 MiB cache."""

BUCKET_STATS = np.dtype([("rejected", "u4"), ("max_d2", "u4"), ("sum_d2", "u8")])
"""Statistics of a bucket's codes, ``MpdBucketStats`` of ``layout.h``.

`rejected` is 1 if the bucket failed its checksum or its range. `max_d2` and `sum_d2` are the
largest and the sum of the squared distances in units of the scale, 0 if rejected. They are
integers, so that the result does not depend on the order of summation."""

Array = Any  # NumPy or CuPy


class EncodedVectorStruct(ctypes.Structure):
    """Mirror of MpdEncodedVector of ``layout.h``."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("checksums", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("nearest", ctypes.c_int64),
    )


def buckets_of(elements: int) -> int:
    """Return the number of buckets of a vector; the last one may be partly empty."""
    return -(-elements // BUCKET)


def code_dtype(bits: int) -> np.dtype:
    """Return the dtype in which codes are stored; two 4-bit codes share a byte."""
    return np.dtype(np.uint16 if bits == 16 else np.uint8)


def codes_of(elements: int, bits: int) -> int:
    """Return the number of items of `code_dtype` that hold the codes of a vector."""
    return buckets_of(elements) * (BUCKET // 2 if bits == 4 else BUCKET)


class EncodedVector:
    """A model (publication) or a delta in lattice codes: views of memory owned by the caller.

    Args:
        elements: length of the vector.
        bits: 4, 8 or 16 bits per code.
        codes: codes, shape (`codes_of`,), `code_dtype`; their order is drawn in ``layout.h``.
        scales: float32, shape (buckets,). In a delta they are its units: signed, and 0 where the
            bucket was rejected.
        checksums: uint32, shape (buckets,).
        seed: seed of the message, unsigned 64 bits; its dither and its checksums depend on it.
        nearest: whether codes are rounded to the nearest instead of with dither (unbiased).

    Raises:
        UserError: an array has another shape, dtype or memory layout.

    Attributes:
        native: description of the arrays that a backend keeps from call to call, or None.
    """

    __slots__ = ("bits", "checksums", "codes", "elements", "native", "nearest", "scales", "seed")

    def __init__(
        self,
        elements: int,
        bits: int,
        codes: Array,
        scales: Array,
        checksums: Array,
        seed: int = 0,
        nearest: bool = False,
    ) -> None:
        if bits not in BITS:
            raise UserError(f"bits: expected 4, 8 or 16, got {bits}")
        buckets = buckets_of(elements)
        require("codes", codes, code_dtype(bits), codes_of(elements, bits))
        require("scales", scales, np.dtype(np.float32), buckets)
        require("checksums", checksums, np.dtype(np.uint32), buckets)
        self.elements = elements
        self.bits = bits
        self.codes = codes
        self.scales = scales
        self.checksums = checksums
        self.seed = seed
        self.nearest = nearest
        self.native: Any = None

    @classmethod
    def empty(
        cls, elements: int, bits: int, seed: int = 0, nearest: bool = False, xp: Any = np
    ) -> EncodedVector:
        """Return a vector of zeros in its own memory, allocated by `xp` (NumPy or CuPy)."""
        buckets = buckets_of(elements)
        return cls(
            elements,
            bits,
            xp.zeros(codes_of(elements, bits), code_dtype(bits)),
            xp.zeros(buckets, np.float32),
            xp.zeros(buckets, np.uint32),
            seed,
            nearest,
        )


class FusedStep:
    """Everything that one pass over a model may do; None or empty leaves that part out.

    The parts are done in the order of the attributes below. `mpi_dasgd.kernels.lattice` has the
    formulas.

    Args:
        x: model, float32, shape (elements,); changed in place.
        threads: number of CPU threads that share the buckets; the result does not depend on it.

    Attributes:
        optimizer: step of an optimizer, made before all else.
        deltas: deltas to apply, in this order.
        delta_stats: statistics of each delta, `BUCKET_STATS`, shape (buckets,) each; written.
        partner_model: publication to exchange or merge with.
        weight: share of the distance to move, in (0, 1].
        merge: 0 exchanges on the lattice, 1 averages with the decoded model, 2 does so with the
            dither subtracted.
        stats: statistics of `partner_model`, `BUCKET_STATS`, shape (buckets,); written.
        reply_delta: receives the partner's delta, in an exchange.
        publication: receives the codes of the new model; its scales are given.
    """

    __slots__ = (
        "delta_stats", "deltas", "merge", "optimizer", "partner_model", "publication",
        "reply_delta", "stats", "threads", "weight", "x",
    )  # fmt: skip

    def __init__(self, x: Array, threads: int = 1) -> None:
        self.x = x
        self.threads = threads
        self.optimizer: OptimizerStep | None = None
        self.deltas: tuple[EncodedVector, ...] = ()
        self.delta_stats: tuple[Array, ...] = ()
        self.partner_model: EncodedVector | None = None
        self.weight = 0.5
        self.merge = 0
        self.stats: Array | None = None
        self.reply_delta: EncodedVector | None = None
        self.publication: EncodedVector | None = None

    @property
    def bits(self) -> int:
        """Bits per code, the same in all messages."""
        messages = (*self.deltas, self.partner_model, self.reply_delta, self.publication)
        return next((m.bits for m in messages if m is not None), 8)

    def validate(self) -> None:
        """Refuse arrays and messages that do not belong together.

        Raises:
            UserError: names the argument, what was expected, and what was given.
        """
        require("x", self.x, np.dtype(np.float32), writable=True)
        size, bits = self.x.size, self.bits
        written = ("reply_delta", "publication")
        messages = {name: getattr(self, name) for name in ("partner_model", *written)}
        messages |= {f"deltas[{i}]": delta for i, delta in enumerate(self.deltas)}
        for name, message in messages.items():
            if message is not None and (message.elements, message.bits) != (size, bits):
                raise UserError(
                    f"{name}: expected codes of {size} elements with {bits} bits, got "
                    f"{message.elements} elements with {message.bits} bits"
                )
        for name in written:
            message = messages[name]
            if message is not None and not _writable(message.codes):
                raise UserError(
                    f"{name}: expected memory that can be written, got a read-only view"
                )
        for array in (self.stats, *self.delta_stats):
            if array is not None:
                require("stats", array, BUCKET_STATS, buckets_of(size), writable=True)
        if self.optimizer is not None:
            require("segments", self.optimizer.segments, SEGMENT)
            require("groups", self.optimizer.groups, GROUP)
            for name in ("first", "second", "third"):
                array = getattr(self.optimizer, name)
                if array is not None:
                    require(name, array, np.dtype(np.float32), size, writable=True)
        if not 0 < self.weight <= 1:
            raise UserError(
                f"weight: expected a share of the distance in (0, 1], got {self.weight}"
            )


def require(
    name: str, array: Array, dtype: np.dtype, size: int | None = None, *, writable: bool = False
) -> None:
    """Refuse an array that the kernels cannot take.

    Raises:
        UserError: it is not 1-D, contiguous, aligned, of this dtype and size, or is read-only.
    """
    expected = f"{name}: expected a 1-D, contiguous array of {dtype}"
    if getattr(array, "dtype", None) != dtype or array.ndim != 1:
        given = f"{array.dtype} of shape {array.shape}" if hasattr(array, "dtype") else type(array)
        raise UserError(f"{expected}, got {given}")
    if size is not None and array.size != size:
        raise UserError(f"{expected} of size {size}, got {array.size} elements")
    if not array.flags.c_contiguous:
        raise UserError(f"{expected}, got strides of {array.strides} bytes; make a copy")
    if not getattr(array.flags, "aligned", True):
        raise UserError(f"{expected}, got one that is not aligned to its elements; make a copy")
    if writable and not _writable(array):
        raise UserError(f"{expected} that can be written, got a read-only one; make a copy")


def _writable(array: Array) -> bool:
    return bool(getattr(array.flags, "writeable", True))
