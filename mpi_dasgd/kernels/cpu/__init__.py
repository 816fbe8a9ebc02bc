"""The lattice codec on the CPU: ``lattice.cpp``, compiled for several instruction sets, by ctypes."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from mpi_dasgd.kernels import native
from mpi_dasgd.kernels.coded import Coded, Step

__all__ = ["instruction_sets", "run", "use_instruction_set"]


class _Message(ctypes.Structure):
    """MpdMessage of ``lattice.h``."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("checks", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("nearest", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    """MpdStep of ``lattice.h``."""

    _fields_ = (
        ("bits", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("arrived", ctypes.c_void_p),
        ("arrived_found", ctypes.c_void_p),
        ("arrivals", ctypes.c_int64),
        ("theirs", ctypes.c_void_p),
        ("weight", ctypes.c_float),
        ("merge", ctypes.c_int32),
        ("found", ctypes.c_void_p),
        ("reply", ctypes.c_void_p),
        ("velocity", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("rate", ctypes.c_float),
        ("momentum", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("published", ctypes.c_void_p),
    )


def run(step: Step) -> None:
    """Do what `step` says; other Python threads run meanwhile."""
    count = len(step.arrived)
    arrived = (ctypes.c_void_p * count)(*map(_message, step.arrived))
    founds = (ctypes.c_void_p * count)(*map(_address, step.arrived_found or ()))
    call = _Step(
        step.bits, _address(step.x), step.x.size, ctypes.addressof(arrived),
        ctypes.addressof(founds) if step.arrived_found else None, count, _message(step.theirs),
        step.weight, step.merge, _address(step.found), _message(step.reply),
        _address(step.velocity), _address(step.gradient), step.rate, step.momentum, step.decay,
        step.threads, _message(step.published),
    )  # fmt: skip
    _library().mpd_lattice_step(ctypes.byref(call))


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
    library.mpd_lattice_step.restype = None
    return library


def _message(coded: Coded | None) -> int | None:
    """Return the address of a message's description, which is made once."""
    if coded is None:
        return None
    native_message: _Message | None = coded.native
    if native_message is None:
        native_message = coded.native = _Message(
            _address(coded.codes), _address(coded.scales), _address(coded.checks)
        )
    native_message.seed = coded.seed
    native_message.nearest = coded.nearest
    return ctypes.addressof(native_message)


def _address(array: np.ndarray | None) -> int | None:
    """Where an array lies; ``array.ctypes.data`` would make an object for each call."""
    return None if array is None else array.__array_interface__["data"][0]
