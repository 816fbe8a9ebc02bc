"""Raw samples of a benchmark in HDF5, and their quartiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import ArrayLike

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.atomic_file import atomic
from mpi_dasgd.storage.provenance import provenance
from mpi_dasgd.storage.schema import LIBVER

__all__ = [
    "DIRECTORY",
    "Quartiles",
    "columns_of",
    "quartiles",
    "read_samples",
    "samples_path",
    "write_samples",
]

DIRECTORY = "bench-results"
"""Default directory for raw samples, relative to the working directory."""


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    q1: float
    median: float
    q3: float


def quartiles(samples: ArrayLike) -> Quartiles:
    """Return the quartiles of samples, shape (n,), interpolated linearly, in their unit."""
    return Quartiles(*np.percentile(np.asarray(samples, np.float64), (25, 50, 75)).tolist())


def samples_path(name: str, directory: str | Path | None = None) -> Path:
    """Return the path ``DIRECTORY/NAME-DATE-TIME.h5`` and make its directory.

    Args:
        name: name of the benchmark.
        directory: directory of the file; None for `DIRECTORY`.

    Raises:
        UserError: the directory cannot be made.
    """
    folder = Path(DIRECTORY if directory is None else directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"bench: directory {folder} for the samples cannot be made ({error.strerror}); "
            "give another one with --out"
        ) from error
    return folder / f"{name}-{datetime.now():%Y%m%d-%H%M%S}.h5"


def columns_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the columns of a table, given its rows, which all have the same keys."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def write_samples(
    path: Path,
    name: str,
    columns: Mapping[str, ArrayLike],
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """Write one table of raw samples with its provenance, and return `path`.

    Args:
        path: HDF5 file, written atomically; an existing file is replaced.
        name: name of the benchmark, and of the group that holds the columns.
        columns: columns of numbers or strings, shape (n,) each. Their names contain the unit, as
            in ``seconds`` or ``bytes``.
        attributes: attributes of the group: settings of the measurement.

    Raises:
        ValueError: the columns differ in length.
    """
    lengths = {column: len(np.asarray(values)) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of {name!r} differ in length: {lengths}")
    with atomic(path) as temporary, h5py.File(temporary, "w", libver=LIBVER) as file:
        file.attrs.update(provenance())
        group = file.create_group(name)
        group.attrs.update(attributes or {})
        for column, values in columns.items():
            array = np.asarray(values)
            if array.dtype.kind == "U":
                group.create_dataset(column, data=array.astype(object), dtype=h5py.string_dtype())
            else:
                group.create_dataset(column, data=array, compression="gzip", shuffle=True)
    return path


def read_samples(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file that `write_samples` wrote.

    Returns:
        The columns by name, shape (n,) each, and the attributes of file and group in one mapping;
        its entry ``bench`` is the name of the benchmark.
    """
    with h5py.File(path, "r") as file:
        (name,) = file
        group = file[name]
        attributes = {**file.attrs, **group.attrs, "bench": name}
        columns = {
            column: data.asstr()[:] if h5py.check_string_dtype(data.dtype) else data[:]
            for column, data in group.items()
        }
    return columns, attributes
