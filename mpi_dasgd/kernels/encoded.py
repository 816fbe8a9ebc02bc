"""Coded vectors: where the lattice codes of a model or a delta lie, and what is found in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpi_dasgd.errors import UserError

__all__ = [
    "BITS",
    "BUCKET",
    "CACHE_BLOCK",
    "FOUND",
    "Coded",
    "Step",
    "buckets_of",
    "code_dtype",
    "codes_of",
]

BITS = (4, 8, 16)
BUCKET = 1024
"""Elements that share a scale and a checksum; models are padded to a multiple of it."""

CACHE_BLOCK = 16 * BUCKET
"""Elements that NumPy loops process at a time: five float32 blocks stay in a 1 MiB cache."""

FOUND = np.dtype([("rejected", "u4"), ("max_d2", "u4"), ("sum_d2", "u8")])
"""What a bucket's codes say: whether it was rejected, and the largest and the sum of the squared
distances in units of the scale (0 if rejected). Integers, so that no order of summation shows."""

Array = Any  # of NumPy or CuPy


def buckets_of(elements: int) -> int:
    """Return the number of buckets of a vector; the last one may be partly empty."""
    return -(-elements // BUCKET)


def code_dtype(bits: int) -> np.dtype:
    """Return the type in which codes are stored; two codes of 4 bits share a byte."""
    return np.dtype(np.uint16 if bits == 16 else np.uint8)


def codes_of(elements: int, bits: int) -> int:
    """Return how many items of `code_dtype` hold the codes of a vector."""
    return buckets_of(elements) * (BUCKET // 2 if bits == 4 else BUCKET)


class Coded:
    """A vector as lattice codes: views of memory that somebody else owns.

    Args:
        elements: length of the vector.
        bits: 4, 8 or 16 bits a code.
        codes: shape (`codes_of`,), `code_dtype`.
        scales: float32, shape (buckets,). For a delta they are its units: signed, 0 where the
            bucket was rejected.
        checks: uint32, shape (buckets,).
        seed: of the message, unsigned 64 bits: what is random and what is checked depends on it.
        nearest: codes are rounded to the nearest, instead of with dither (unbiased).

    Raises:
        UserError: an array has another shape, type or layout.
    """

    __slots__ = ("bits", "checks", "codes", "elements", "native", "nearest", "scales", "seed")

    def __init__(
        self,
        elements: int,
        bits: int,
        codes: Array,
        scales: Array,
        checks: Array,
        seed: int = 0,
        nearest: bool = False,
    ) -> None:
        if bits not in BITS:
            raise UserError(f"bits: expected 4, 8 or 16, got {bits}")
        buckets = buckets_of(elements)
        require("codes", codes, code_dtype(bits), codes_of(elements, bits))
        require("scales", scales, np.dtype(np.float32), buckets)
        require("checks", checks, np.dtype(np.uint32), buckets)
        self.elements = elements
        self.bits = bits
        self.codes = codes
        self.scales = scales
        self.checks = checks
        self.seed = seed
        self.nearest = nearest
        self.native: Any = None  # how a backend describes these arrays, kept from call to call

    @classmethod
    def empty(
        cls, elements: int, bits: int, seed: int = 0, nearest: bool = False, xp: Any = np
    ) -> Coded:
        """Return one with memory of its own, zeros, of NumPy or of the module `xp` (CuPy)."""
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


class Step:
    """Everything that one pass over a model may do; see `mpi_dasgd.kernels.lattice`."""

    __slots__ = (
        "arrived", "arrived_found", "decay", "found", "gradient", "merge", "momentum",
        "published", "rate", "reply", "theirs", "threads", "velocity", "weight", "x",
    )  # fmt: skip

    def __init__(self, x: Array, threads: int = 1) -> None:
        self.x = x
        self.threads = threads
        self.arrived: tuple[Coded, ...] = ()
        self.arrived_found: tuple[Array, ...] = ()
        self.theirs: Coded | None = None
        self.weight = 0.5
        self.merge = 0  # 0: exchange; 1: plain average; 2: plain average, dither subtracted
        self.found: Array | None = None
        self.reply: Coded | None = None
        self.velocity: Array | None = None
        self.gradient: Array | None = None
        self.rate = self.momentum = self.decay = 0.0
        self.published: Coded | None = None

    @property
    def bits(self) -> int:
        """Bits of the codes, the same in all messages."""
        messages = (*self.arrived, self.theirs, self.reply, self.published)
        return next((m.bits for m in messages if m is not None), 8)

    def check(self) -> None:
        """Refuse arrays and messages that do not belong together.

        Raises:
            UserError: says which, what was expected, and what came.
        """
        require("x", self.x, np.dtype(np.float32), writable=True)
        size, bits = self.x.size, self.bits
        named = {"theirs": self.theirs, "reply": self.reply, "published": self.published}
        named |= {f"arrived[{i}]": delta for i, delta in enumerate(self.arrived)}
        for name, message in named.items():
            if message is not None and (message.elements, message.bits) != (size, bits):
                raise UserError(
                    f"{name}: expected codes of {size} elements with {bits} bits, got "
                    f"{message.elements} elements with {message.bits} bits"
                )
        for name in ("reply", "published"):
            message = named[name]
            if message is not None and not _writable(message.codes):
                raise UserError(
                    f"{name}: expected memory that can be written, got a read-only view"
                )
        buckets = buckets_of(size)
        for name, array in (("found", self.found), *(("found", a) for a in self.arrived_found)):
            if array is not None:
                require(name, array, FOUND, buckets, writable=True)
        for name, array in (("velocity", self.velocity), ("gradient", self.gradient)):
            if array is not None:
                require(name, array, np.dtype(np.float32), size, writable=name == "velocity")
        if not 0 < self.weight <= 1:
            raise UserError(
                f"weight: expected a share of the distance in (0, 1], got {self.weight}"
            )


def require(
    name: str, array: Array, dtype: np.dtype, size: int | None = None, *, writable: bool = False
) -> None:
    """Refuse an array that the kernels cannot take.

    Raises:
        UserError: it is not 1-D, contiguous, aligned, of this type and size, or is read-only.
    """
    expected = f"{name}: expected a 1-D, contiguous array of {dtype}"
    if getattr(array, "dtype", None) != dtype or array.ndim != 1:
        what = f"{array.dtype} of shape {array.shape}" if hasattr(array, "dtype") else type(array)
        raise UserError(f"{expected}, got {what}")
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
