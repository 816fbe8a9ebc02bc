"""Samples of a benchmark: kept raw in HDF5, told by their median and quartiles."""

from __future__ import annotations

from collections.abc import Mapping
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

__all__ = ["DIRECTORY", "Quartiles", "quartiles", "read_samples", "samples_path", "write_samples"]

DIRECTORY = "bench-results"
"""Where benchmarks leave their samples unless told otherwise."""


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    q1: float
    median: float
    q3: float


def quartiles(samples: ArrayLike) -> Quartiles:
    """Return the quartiles of 1-D samples, interpolated linearly."""
    return Quartiles(*np.percentile(np.asarray(samples, np.float64), (25, 50, 75)).tolist())


def samples_path(name: str, directory: str | Path | None = None) -> Path:
    """Return ``DIRECTORY/NAME-DATE-TIME.h5`` in a directory that exists now.

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


def write_samples(
    path: Path,
    name: str,
    columns: Mapping[str, ArrayLike],
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """Write one table of raw samples, with where it came from, and return `path`.

    Args:
        path: HDF5 file to write, whole or not at all; an existing one is replaced.
        name: name of the benchmark, and of the group that holds the columns.
        columns: 1-D columns of equal length, numbers or strings; units belong in their names,
            as in ``seconds`` or ``bytes``.
        attributes: of the group: what was measured, and with which settings.
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
    """Read a file of `write_samples`: its columns, and all attributes together."""
    with h5py.File(path, "r") as file:
        (name,) = file
        group = file[name]
        attributes = {**file.attrs, **group.attrs, "bench": name}
        columns = {
            column: data.asstr()[:] if h5py.check_string_dtype(data.dtype) else data[:]
            for column, data in group.items()
        }
    return columns, attributes
