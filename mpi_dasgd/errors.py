"""The errors that end a run with one message and a known exit code instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["Diverged", "MpiDasgdError", "PeerLost", "Unreachable", "UserError", "nearest"]


class MpiDasgdError(Exception):
    """Base of all errors of this package.

    Attributes:
        exit_code: status with which a program that ends with this error exits.
    """

    exit_code = 1


class UserError(MpiDasgdError):
    """Bad input: the message names the argument or file, what was expected, what came, and what to do."""

    exit_code = 2


class Diverged(MpiDasgdError):
    """The loss of a rank became NaN or infinite."""

    exit_code = 3


class PeerLost(MpiDasgdError):
    """A rank that the others cannot do without went silent."""

    exit_code = 4


class Unreachable(MpiDasgdError):
    """A window operation on a rank failed: it is gone.

    Attributes:
        rank: which one.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} cannot be reached")
        self.rank = rank


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid name nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
