"""The lattice codec on the CPU: ctypes bindings of ``lattice.cpp`` and ``roofline.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from mpi_dasgd.kernels import native
from mpi_dasgd.kernels.encoded import EncodedVector, EncodedVectorStruct, FusedStep
from mpi_dasgd.kernels.optimizer_native import optimizer_struct

__all__ = [
    "PASSES",
    "FusedStepStruct",
    "instruction_sets",
    "prepared",
    "roofline",
    "run",
    "use_instruction_set",
]

PASSES = (
    "trivial", "streamed", "copy", "triad",
    "decode", "statistics", "difference", "move", "average",
)  # fmt: skip
"""Passes of `roofline`, in the order of MpdRooflinePass in ``roofline.h``, which explains them."""


class FusedStepStruct(ctypes.Structure):
    """Mirror of MpdFusedStep of ``fused_step.h``."""

    _fields_ = (
        ("bits", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("optimizer", ctypes.c_void_p),
        ("deltas", ctypes.c_void_p),
        ("delta_stats", ctypes.c_void_p),
        ("delta_count", ctypes.c_int64),
        ("partner_model", ctypes.c_void_p),
        ("weight", ctypes.c_float),
        ("merge", ctypes.c_int32),
        ("stats", ctypes.c_void_p),
        ("reply_delta", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("publication", ctypes.c_void_p),
    )


def run(step: FusedStep) -> None:
    """Do `step`; other Python threads run meanwhile."""
    _library().mpd_fused_step(ctypes.byref(_struct_of(step)))


def prepared(step: FusedStep) -> Callable[[], None]:
    """Return a function that does `step` at each call: for benchmarks of small models."""
    return partial(_library().mpd_fused_step, ctypes.byref(_struct_of(step)))


def roofline(step: FusedStep, name: str, scratch: np.ndarray) -> Callable[[], None]:
    """Return a function that makes one of `PASSES` over the arrays of a step: for benchmarks.

    Args:
        step: step whose arrays are passed over.
        name: name of the pass.
        scratch: float32, shape (elements,): passes its contents from one pass to the next.
    """
    call = _struct_of(step)
    call.alive += (scratch,)
    address = ctypes.c_void_p(_address(scratch))
    return partial(_library().mpd_roofline, ctypes.byref(call), PASSES.index(name), address)


def instruction_sets() -> list[str]:
    """Return the instruction sets that were compiled and that this machine supports, best first."""
    return str(_library().mpd_instruction_sets().decode()).split()


def use_instruction_set(name: str) -> None:
    """Make `run` use another instruction set than the best: for tests and benchmarks.

    Raises:
        ValueError: it is not supported here.
    """
    if not _library().mpd_use_instruction_set(name.encode()):
        raise ValueError(
            f"instruction set {name!r}: this machine and build have {instruction_sets()}"
        )


@cache
def _library() -> ctypes.CDLL:
    library = native.load()
    assert library is not None, "chosen only where there is one"
    library.mpd_instruction_sets.restype = ctypes.c_char_p
    library.mpd_fused_step.restype = library.mpd_roofline.restype = None
    return library


def _struct_of(step: FusedStep) -> FusedStepStruct:
    """Return the argument of a step; its attribute `alive` keeps the arrays that it points to."""
    count = len(step.deltas)
    deltas = (ctypes.c_void_p * count)(*map(_vector, step.deltas))
    delta_stats = (ctypes.c_void_p * count)(*map(_address, step.delta_stats or ()))
    call = FusedStepStruct(
        step.bits, _address(step.x), step.x.size, optimizer_struct(step.optimizer),
        ctypes.addressof(deltas), ctypes.addressof(delta_stats) if step.delta_stats else None,
        count,
        _vector(step.partner_model), step.weight, step.merge, _address(step.stats),
        _vector(step.reply_delta), step.threads, _vector(step.publication),
    )  # fmt: skip
    call.alive = (deltas, delta_stats, step)
    return call


def _vector(encoded: EncodedVector | None) -> int | None:
    """Return the address of a vector's EncodedVectorStruct, which is made once per vector."""
    if encoded is None:
        return None
    struct: EncodedVectorStruct | None = encoded.native
    if struct is None:
        struct = encoded.native = EncodedVectorStruct(
            _address(encoded.codes), _address(encoded.scales), _address(encoded.checksums)
        )
    struct.seed = encoded.seed
    struct.nearest = encoded.nearest
    return ctypes.addressof(struct)


def _address(array: np.ndarray | None) -> int | None:
    """Return the address of an array's memory."""
    if array is None:
        return None
    if array.dtype.names:  # the array interface of a structured dtype takes 40 us to describe
        return array.ctypes.data
    return array.__array_interface__["data"][0]  # without the object that `ctypes` creates
