"""Loads a run: from its results.h5, or from its ranks' run files if it is live or was killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpi_dasgd.analysis.run import Run
from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.old_names import (
    RANK_COLUMNS,
    check_version,
    renamed_attributes,
    stored_name,
)
from mpi_dasgd.storage.results import Results, gather, results_path
from mpi_dasgd.storage.runfile import plain, rank_path
from mpi_dasgd.storage.schema import CONSENSUS, FORMAT, RANKS, TABLES

__all__ = ["Run", "load_run"]

FILE_ATTRIBUTES = ("format", "format_version", "content", "ranks_lost", "ranks_lost_reason")


def load_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: a run directory or its results.h5. In a directory without results.h5 the run files of
            the ranks are read, so that a live or a killed run can be reported.

    Raises:
        UserError: if there is no run, it has no records yet, or a file is damaged or of a newer
            format version.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: expected a run directory or a results.h5, found nothing there")
    file = results_path(path) if path.is_dir() else path
    directory = file.parent
    if file.exists():
        results = _read_results(file)
    elif rank_path(directory, 0).parent.is_dir():
        results = gather(directory)
    else:
        raise UserError(
            f"{path}: expected a run directory, found neither results.h5 nor ranks/; "
            "give the directory that the run was told to write to"
        )
    if not results.n_records["train"].any():
        raise UserError(
            f"{path}: the run has no records yet; wait until its ranks have taken steps"
        )
    name = str(results.attributes.get("name") or directory.resolve().name)
    return Run(name=name, path=directory, results=results)


def _read_results(path: Path) -> Results:
    """Read a results.h5 and verify every checksum."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            attributes = {name: plain(value) for name, value in file.attrs.items()}
            if attributes.get("format") != FORMAT:
                raise UserError(
                    f"{path}: expected a results.h5 of mpi_dasgd, found another HDF5 file"
                )
            check_version(path, attributes)
            if attributes["content"] != "results":
                raise UserError(
                    f"{path}: expected a results.h5, found the file of one rank; "
                    f"give the run directory {path.resolve().parent.parent}"
                )
            return _results(file, attributes)
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: expected a results.h5, found a damaged file ({error}); if the run directory "
            "still has ranks/, remove this file and the run files are read"
        ) from error


def _results(file: h5py.File, attributes: dict[str, Any]) -> Results:
    lost = {
        int(rank): reason
        for rank, reason in zip(
            attributes["ranks_lost"], attributes["ranks_lost_reason"].split("; "), strict=False
        )
    }
    return Results(
        attributes=renamed_attributes(
            {name: value for name, value in attributes.items() if name not in FILE_ATTRIBUTES}
        ),
        rank=file["ranks/rank"][()],
        n_records={table: file[table]["records"][()] for table in TABLES},
        tables={
            table: {
                column.name: file[table][stored_name(column.name, file[table])][()]
                for column in columns
            }
            for table, columns in TABLES.items()
        },
        rank_table={
            RANK_COLUMNS.get(name, name): _values(file["ranks"][name])
            for name in _rank_columns(file["ranks"])
        },
        consensus=_consensus(file.get("consensus", {})),
        lost=lost,
    )


def _consensus(group: Mapping[str, h5py.Dataset]) -> dict[str, np.ndarray]:
    names = {column.name: stored_name(column.name, group) for column in CONSENSUS}
    return {name: group[stored][()] for name, stored in names.items() if stored in group}


def _rank_columns(group: h5py.Group) -> list[str]:
    """Return the columns of /ranks, the declared ones first."""
    declared = [column.name for column in RANKS if column.name in group]
    return declared + [name for name in group if name not in {"rank", *declared}]


def _values(data: h5py.Dataset) -> Any:
    return data.asstr()[()] if h5py.check_string_dtype(data.dtype) else data[()]
