"""Names of format version 1: files of that version are read under the names of today."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.schema import FORMAT_VERSION

__all__ = ["RANK_COLUMNS", "check_version", "renamed_attributes", "stored_name"]

_COLUMNS = {"time_s": "time", "total_samples": "progress", "set_staleness": "staleness"}
"""Old name of each renamed column of a table; the table tells which one is meant."""

RANK_COLUMNS = {
    "retries": "torn_reads",
    "taken": "claims_lost",
    "refusals": "inbox_full",
    "delay_mean": "server_delay_mean",
    "delay_average": "server_delay_average",
    "delay_max": "server_delay_max",
}
"""New name of each renamed column of /ranks."""

_ATTRIBUTES = {"ranks": "world_size"}


def check_version(path: Path, attributes: Mapping[str, Any]) -> None:
    """Refuse a file that a later version of the package has written.

    Raises:
        UserError: if its format version is above `FORMAT_VERSION`.
    """
    version = int(attributes.get("format_version", 1))
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path}: expected format version {FORMAT_VERSION} or below, found {version}: a newer "
            "mpi_dasgd has written it; install that one"
        )


def stored_name(name: str, group: Container[str]) -> str:
    """Return the name under which `group` has the column `name`: the old one in old files."""
    old = _COLUMNS.get(name, name)
    return old if name not in group and old in group else name


def renamed_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return root attributes of a results.h5 under the names of today."""
    return {_ATTRIBUTES.get(name, name): value for name, value in attributes.items()}
