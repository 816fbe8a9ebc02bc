"""Benchmarks: each measures beside its limit or its rival in one run, and keeps raw samples."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mpi_dasgd.errors import UserError, nearest

__all__ = ["NAMES", "run"]

NAMES = ("kernel", "quality", "rma", "training")


def run(name: str, rest: Sequence[str]) -> int:
    """Run benchmark `name` with its own arguments and return its exit code.

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in NAMES:
        raise UserError(
            f"bench: {name!r} is not known{nearest(name, NAMES)} (valid: {', '.join(NAMES)})"
        )
    module = importlib.import_module(f"mpi_dasgd.bench.{name}")
    return int(module.main(list(rest)))
