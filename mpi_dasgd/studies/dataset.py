"""Raw samples of a study: labelled arrays in memory and in HDF5, and statistics of them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mpi_dasgd import __version__
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError

__all__ = [
    "Axis",
    "Dataset",
    "Summary",
    "Variable",
    "loglog_slope",
    "measure",
    "read",
    "seed_axis",
    "spread",
    "write",
]


class Axis(NamedTuple):
    """A dimension of the samples: what was varied.

    Attributes:
        values: numbers or strings, 1-D.
        unit: unit of the values, "1" if there is none.
        meaning: description of the values.
    """

    values: ArrayLike
    unit: str
    meaning: str


class Variable(NamedTuple):
    """A quantity measured at every point.

    Attributes:
        unit: unit of the values, "1" if there is none.
        meaning: description of the values.
        dimensions: names of the axes of its array. Arguments of `measure` name those of a single
            point alone, () for a number.
    """

    unit: str
    meaning: str
    dimensions: tuple[str, ...] = ()


class Summary(NamedTuple):
    """Results of a study, computed from its samples.

    Attributes:
        rows: table with the same keys in every row; numbers, strings or None.
        figures: numbers that answer the question: exponents, ratios; as JSON can hold them.
    """

    rows: list[dict[str, Any]]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """All samples of a study, as they were measured.

    Names of variables are those of older files and are kept: the variables `disagreement` and
    `spread` are consensus distances, mean_i |x_i - mean|^2.

    Attributes:
        name: name of the study.
        axes: dimensions by name, with arrays as values.
        variables: measured quantities by name.
        arrays: measured values by name, float64; NaN where a run diverged or never got there.
        attributes: config_json of the setting that all points share, version, and so on.
    """

    name: str
    axes: dict[str, Axis]
    variables: dict[str, Variable]
    arrays: dict[str, np.ndarray]
    attributes: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name] if name in self.arrays else np.asarray(self.axes[name].values)


def seed_axis(seeds: int) -> Axis:
    """Return the axis of the seeds 1 to `seeds`."""
    return Axis(list(range(1, seeds + 1)), "1", "run.seed")


def spread(values: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the least, median and largest value over `axis`, the seeds; NaN counts as infinite."""
    never = np.where(np.isnan(values), np.inf, values)
    return never.min(axis), np.median(never, axis), never.max(axis)


def measure(
    name: str,
    config: Config,
    axes: Mapping[str, Axis],
    variables: Mapping[str, Variable],
    point: Callable[..., Mapping[str, ArrayLike | None]],
    inner: Mapping[str, Axis] | None = None,
) -> Dataset:
    """Call `point` for every combination of the axes' values and keep what it returns.

    Args:
        name: name of the study.
        config: setting that all points share; it is stored with the samples.
        axes: what is varied, the slowest first; their names are the keywords of `point`.
        variables: what `point` returns, by name.
        point: returns a number or an array for each variable; None for "never".
        inner: dimensions of the arrays that `point` returns.
    """
    arrayed = {k: Axis(np.asarray(a.values), a.unit, a.meaning) for k, a in axes.items()}
    within = {k: Axis(np.asarray(a.values), a.unit, a.meaning) for k, a in (inner or {}).items()}
    every = arrayed | within
    whole = {k: v._replace(dimensions=(*arrayed, *v.dimensions)) for k, v in variables.items()}
    arrays = {
        k: np.full([len(np.asarray(every[d].values)) for d in v.dimensions], np.nan)
        for k, v in whole.items()
    }
    lists = [np.asarray(axis.values).tolist() for axis in arrayed.values()]
    total = int(np.prod([len(values) for values in lists]))
    for number, index in enumerate(np.ndindex(*map(len, lists))):
        if sys.stderr.isatty():
            print(f"\rstudy {name}: {number} of {total} ", end="", file=sys.stderr, flush=True)
        values = {k: lists[d][index[d]] for d, k in enumerate(arrayed)}
        for variable, value in point(**values).items():
            if value is not None:
                arrays[variable][index] = value
    if sys.stderr.isatty():
        print(f"\r{'':<40}\r", end="", file=sys.stderr, flush=True)
    attributes = {"config_json": config.model_dump_json(), "version": __version__}
    return Dataset(name, every, whole, arrays, attributes)


def loglog_slope(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return the slope of a least-squares line through log y over log x; None below 2 points."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if good.sum() < 2:
        return None
    return float(np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0])


def write(samples: Dataset, path: Path) -> Path:
    """Write the samples to an HDF5 file, completely or not at all, and return `path`.

    The one group, named like the study, has dimension scales, and arrays with units and meaning, so
    that xarray opens it. The attributes of the root say where the file came from.
    """
    import h5py

    from mpi_dasgd.storage.atomic_file import atomic
    from mpi_dasgd.storage.provenance import provenance
    from mpi_dasgd.storage.schema import LIBVER

    with atomic(path) as temporary, h5py.File(temporary, "w", libver=LIBVER) as file:
        file.attrs.update(provenance() | {"content": "study"})
        group = file.create_group(samples.name)
        group.attrs.update(samples.attributes)
        group.attrs["axes"] = json.dumps(list(samples.axes))  # a group has no order of its own
        for name, axis in samples.axes.items():
            values = np.asarray(axis.values)
            if values.dtype.kind == "U":
                data = group.create_dataset(
                    name, data=values.astype(object), dtype=h5py.string_dtype()
                )
            else:
                data = group.create_dataset(name, data=values)
            data.attrs.update(units=axis.unit, long_name=axis.meaning)
            data.make_scale(name)
        for name, array in samples.arrays.items():
            variable = samples.variables[name]
            data = group.create_dataset(name, data=array, compression="gzip", shuffle=True)
            data.attrs.update(units=variable.unit, long_name=variable.meaning)
            for number, dimension in enumerate(variable.dimensions):
                data.dims[number].attach_scale(group[dimension])
    return path


def read(path: str | Path) -> Dataset:
    """Read what `write` wrote.

    Raises:
        UserError: `path` is not the file of a study.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            (name,) = file
            group = file[name]
            order = json.loads(group.attrs["axes"])
            axes, variables, arrays = {}, {}, {}
            for key in itertools.chain(order, (k for k in group if k not in order)):
                data = group[key]
                unit, meaning = data.attrs["units"], data.attrs["long_name"]
                if key in order:
                    text = h5py.check_string_dtype(data.dtype)
                    axes[key] = Axis(
                        np.array(data.asstr()[:].tolist() if text else data[:]), unit, meaning
                    )
                    continue
                dimensions = tuple(d[0].name.rpartition("/")[2] for d in data.dims)
                variables[key] = Variable(unit, meaning, dimensions)
                arrays[key] = data[:]
            attributes = {k: v for k, v in group.attrs.items() if k != "axes"}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: expected the samples of `mpi-dasgd study`: {error}") from error
    return Dataset(name, axes, variables, arrays, attributes)
