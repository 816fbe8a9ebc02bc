"""Errors that end a run with one message and a documented exit code instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DeviceFailed",
    "Diverged",
    "MpiDasgdError",
    "PeerFailed",
    "PeerLost",
    "Unreachable",
    "UserError",
    "first_line",
    "nearest",
]


class MpiDasgdError(Exception):
    """Base class of all errors of this package.

    Attributes:
        exit_code: exit code of a program that ends with this error.
    """

    exit_code = 1


class UserError(MpiDasgdError):
    """Bad input.

    The message names the argument or file, what was expected, what was given, and the remedy.

    Args:
        message: the message.
        on_all_ranks: whether all ranks raise this error together, so that rank 0 reports it.

    Attributes:
        on_all_ranks: whether all ranks raise this error together.
    """

    exit_code = 2

    def __init__(self, message: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class Diverged(MpiDasgdError):
    """The loss of a rank became NaN or infinite."""

    exit_code = 3


class DeviceFailed(MpiDasgdError):
    """An operation of the GPU failed; nothing that was asked of it later will be done."""


class PeerLost(MpiDasgdError):
    """A rank that the others need stopped responding."""

    exit_code = 4


class PeerFailed(PeerLost):
    """Another rank has ended by an error or with a nonzero exit code.

    It has reported why, so that this rank ends with the same exit code and without a message.

    Args:
        rank: the rank that has failed.
        exit_code: its exit code; 0 if unknown.

    Attributes:
        rank: the rank that has failed.
        exit_code: exit code of a program that ends with this error.
    """

    def __init__(self, rank: int, exit_code: int = 0) -> None:
        super().__init__(f"rank {rank} has failed")
        self.rank = rank
        self.exit_code = exit_code or PeerLost.exit_code


class Unreachable(MpiDasgdError):
    """An RMA operation failed because its target rank is dead.

    Args:
        rank: the target rank.

    Attributes:
        rank: the target rank.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} cannot be reached")
        self.rank = rank


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint at the valid name most similar to `name`, to be appended to a message.

    Returns:
        ``"; did you mean 'x'?"``, or "" if no valid name is similar.
    """
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
