"""Exit code with which the running program is about to end, known while it can still act on it.

Python tells neither an atexit handler nor `sys.excepthook` that `SystemExit` ends the program, or
with which code. But at the end, outside of all Python code, the interpreter reads the attribute
``code`` of that exception: so this attribute is watched.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any, NoReturn

__all__ = ["current", "exit_code_of", "watch"]


class _WatchedCode:
    """Stands for the attribute `SystemExit.code`, and notes its value at the end of the program.

    Args:
        member: the attribute as it was.

    Attributes:
        final: exit code of the exception that ends the program; None if there is none so far.
    """

    def __init__(self, member: Any) -> None:
        self._member = member
        self.final: int | None = None

    def __get__(self, error: SystemExit | None, owner: type | None = None) -> Any:
        if error is None:
            return self._member
        code = self._member.__get__(error, owner)
        try:
            sys._getframe(1)
        except ValueError:  # no Python code is running: it is the interpreter that asks
            self.final = exit_code_of(code)
        return code

    def __set__(self, error: SystemExit, code: object) -> None:
        self._member.__set__(error, code)

    def __delete__(self, error: SystemExit) -> None:
        self._member.__delete__(error)


def watch() -> None:
    """Make `current` know the exit code of the program; further calls do nothing."""
    # Types of the interpreter cannot be changed by assignment, but their dictionary can.
    members = gc.get_referents(SystemExit.__dict__)[0]
    if isinstance(members["code"], _WatchedCode):
        return
    members["code"] = _WatchedCode(members["code"])
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))
    if sys.version_info < (3, 12):
        # There the interpreter has no exception to ask if C code raised it, as that of sys.exit.
        sys.exit = _exit


def _exit(status: object = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status); see `sys.exit`."""
    if isinstance(status, SystemExit):
        raise status
    if isinstance(status, tuple):
        raise SystemExit(*status)
    raise SystemExit() if status is None else SystemExit(status)


def current() -> int | None:
    """Return the exit code of the `SystemExit` that ends the program; None if none does so far."""
    watched = gc.get_referents(SystemExit.__dict__)[0]["code"]
    return watched.final if isinstance(watched, _WatchedCode) else None


def exit_code_of(code: object) -> int:
    """Return the exit code of a process that ends by ``SystemExit(code)``, 0 to 255."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    return 1
