"""Loader of the library of compiled kernels, which ``setup.py`` builds."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = ["load", "status"]

_LIBRARY = Path(__file__).with_name("_native.so")
_ABI = 2
"""MPD_ABI of ``layout.h``: the functions and structs that Python expects."""


def load() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built or cannot be loaded (see `status`)."""
    return _open()[0]


def status() -> str:
    """Return in words which kernels are in use, and if they are not the native ones, why."""
    return _open()[1]


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    if not _LIBRARY.exists():
        failure = _LIBRARY.with_name("_native_failure.txt")
        reason = failure.read_text(encoding="utf-8").strip() if failure.exists() else ""
        why = f"the native ones were not built: {reason or 'run `pip install .`'}"
        return None, f"NumPy kernels ({why})"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, f"NumPy kernels (the native ones cannot be loaded: {error})"
    abi = library.mpd_abi() if hasattr(library, "mpd_abi") else 1
    if abi != _ABI:
        age = "an older" if abi < _ABI else "a newer"
        return None, (
            f"NumPy kernels (the native ones are of {age} version of mpi_dasgd: interface {abi}, "
            f"expected {_ABI}; run `pip install .` again)"
        )
    library.mpd_instruction_set.restype = ctypes.c_char_p
    return library, f"native kernels ({library.mpd_instruction_set().decode()}): {_LIBRARY}"
