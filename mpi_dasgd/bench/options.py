"""Command-line options that the benchmarks have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping

from mpi_dasgd.bench.sample_store import DIRECTORY
from mpi_dasgd.errors import UserError, nearest

__all__ = ["add_output_options", "parse_quantity", "validate_names"]


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--out DIR`` and ``--json`` to the parser of a benchmark."""
    parser.add_argument("--out", metavar="DIR", help=f"directory for the raw samples [{DIRECTORY}]")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )


def validate_names(
    option: str,
    names: Iterable[str],
    valid: Iterable[str],
    show: Callable[[str], str] = str,
) -> None:
    """Require that every name is a valid one.

    Args:
        option: benchmark and option that gave the names, the beginning of the error message.
        names: names that were given.
        valid: names that are allowed.
        show: formats a valid name for the message.

    Raises:
        UserError: a name is not valid.
    """
    valid = list(valid)
    for name in names:
        if name not in valid:
            raise UserError(
                f"{option}: {name!r} is not known{nearest(name, valid)} "
                f"(valid: {', '.join(map(show, valid))})"
            )


def parse_quantity(text: str, units: Mapping[str, int]) -> int:
    """Return the value of a whole number with a unit, as ``4MiB``; 0 if `text` is none.

    Args:
        text: digits and the name of a unit.
        units: value of each unit, by name; the empty name stands for no unit.
    """
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    return int(match[1]) * units.get(match[2], 0) if match else 0
