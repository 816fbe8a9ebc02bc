"""``bench gpu``: what only a GPU can show: the order of words, and the cost of an exchange."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mpi_dasgd.errors import UserError, nearest

__all__ = ["main"]

_PARTS = {"order": "gpu_order", "overhead": "gpu_overhead"}


def main(arguments: Sequence[str]) -> int:
    """Run a part of the benchmark, which its first argument names, and return the exit code.

    Raises:
        UserError: there is no such part, or an argument of it is wrong.
    """
    valid = f"(valid: {', '.join(_PARTS)})"
    if not arguments:
        raise UserError(f"bench gpu: expected what to measure {valid}")
    name, *rest = arguments
    if name not in _PARTS:
        raise UserError(f"bench gpu: {name!r} is not known{nearest(name, _PARTS)} {valid}")
    module = importlib.import_module(f"mpi_dasgd.bench.{_PARTS[name]}")
    return int(module.main(rest))
