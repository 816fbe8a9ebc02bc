"""Benchmarks: each measures against a baseline within one run, and keeps its raw samples."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mpi_dasgd.errors import UserError, nearest

__all__ = ["NAMES", "run"]

NAMES = ("gpu", "kernel", "quality", "rma", "step", "training")


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark and return its exit code.

    Args:
        name: one of `NAMES`.
        arguments: command-line arguments of the benchmark.

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in NAMES:
        raise UserError(
            f"bench: {name!r} is not known{nearest(name, NAMES)} (valid: {', '.join(NAMES)})"
        )
    module = importlib.import_module(f"mpi_dasgd.bench.{name}")
    return int(module.main(list(arguments)))
