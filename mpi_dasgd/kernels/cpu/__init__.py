"""The lattice codec on the CPU: ``lattice.cpp``, compiled for several instruction sets, by ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from mpi_dasgd.kernels import native
from mpi_dasgd.kernels.encoded import EncodedVector, FusedStep

__all__ = ["PASSES", "instruction_sets", "prepared", "run", "use_instruction_set", "yardstick"]

PASSES = (
    "trivial", "streamed", "copy", "triad",
    "decode", "statistics", "difference", "move", "average",
)  # fmt: skip
"""What `yardstick` can do: MpdPass of ``yardstick.h``, where their meaning is."""


class _Message(ctypes.Structure):
    """MpdMessage of ``lattice.h``."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("checksums", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("nearest", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    """MpdStep of ``lattice.h``."""

    _fields_ = (
        ("bits", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("deltas", ctypes.c_void_p),
        ("delta_stats", ctypes.c_void_p),
        ("delta_count", ctypes.c_int64),
        ("partner_model", ctypes.c_void_p),
        ("weight", ctypes.c_float),
        ("merge", ctypes.c_int32),
        ("stats", ctypes.c_void_p),
        ("reply_delta", ctypes.c_void_p),
        ("velocity", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("lr", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("publication", ctypes.c_void_p),
    )


def run(step: FusedStep) -> None:
    """Do what `step` says; other Python threads run meanwhile."""
    _library().mpd_lattice_step(ctypes.byref(_call(step)))


def prepared(step: FusedStep) -> Callable[[], None]:
    """Return what does `step` each time it is called, as `run` does: for benchmarks of small models."""
    return partial(_library().mpd_lattice_step, ctypes.byref(_call(step)))


def yardstick(step: FusedStep, name: str, room: np.ndarray) -> Callable[[], None]:
    """Return what does one of `PASSES` over the arrays of a step each time it is called: for benchmarks.

    Args:
        step: whose arrays are passed over.
        name: of the pass.
        room: float32, of the model's size; what passes leave for each other.
    """
    call = _call(step)
    call.alive += (room,)
    place = ctypes.c_void_p(_address(room))
    return partial(_library().mpd_yardstick, ctypes.byref(call), PASSES.index(name), place)


def instruction_sets() -> list[str]:
    """Return the instruction sets that were compiled and run here, best first."""
    return str(_library().mpd_instruction_sets().decode()).split()


def use_instruction_set(name: str) -> None:
    """Have `run` use another instruction set than the best: for tests and benchmarks.

    Raises:
        ValueError: it cannot run here.
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
    library.mpd_lattice_step.restype = library.mpd_yardstick.restype = None
    return library


def _call(step: FusedStep) -> _Step:
    count = len(step.deltas)
    deltas = (ctypes.c_void_p * count)(*map(_message, step.deltas))
    stats = (ctypes.c_void_p * count)(*map(_address, step.delta_stats or ()))
    call = _Step(
        step.bits, _address(step.x), step.x.size, ctypes.addressof(deltas),
        ctypes.addressof(stats) if step.delta_stats else None, count, _message(step.partner_model),
        step.weight, step.merge, _address(step.stats), _message(step.reply_delta),
        _address(step.velocity), _address(step.gradient), step.lr, step.momentum, step.weight_decay,
        step.threads, _message(step.publication),
    )  # fmt: skip
    call.alive = (deltas, stats, step)
    return call


def _message(encoded: EncodedVector | None) -> int | None:
    """Return the address of a message's description, which is made once."""
    if encoded is None:
        return None
    native_message: _Message | None = encoded.native
    if native_message is None:
        native_message = encoded.native = _Message(
            _address(encoded.codes), _address(encoded.scales), _address(encoded.checksums)
        )
    native_message.seed = encoded.seed
    native_message.nearest = encoded.nearest
    return ctypes.addressof(native_message)


def _address(array: np.ndarray | None) -> int | None:
    """Where an array lies."""
    if array is None:
        return None
    if array.dtype.names:  # whose interface takes 40 us to describe
        return array.ctypes.data
    return array.__array_interface__["data"][0]  # without the object that `ctypes` makes
