"""Studies: curves of the papers, simulated; each writes its samples (HDF5) and a plot."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.storage.json_values import json_value

if TYPE_CHECKING:
    from mpi_dasgd.studies.dataset import Dataset, Summary

__all__ = ["DIRECTORY", "STUDIES", "Study", "find", "run", "table"]

DIRECTORY = "study-results"
"""Default folder of the samples and pictures."""

STUDIES = {
    "slowdown": "throughput when one of 16 workers is slow",
    "delay": "gradients to a given accuracy against the largest delay: asgd, constant and "
    "adaptive steps",
    "speedup": "time to a given accuracy against the number of ranks: adpsgd, swarm",
    "staleness": "gradient norm against gradients at several levels of staleness: dasgd",
    "heterogeneous": "where asgd ends when data and speeds of the workers differ",
    "disagreement": "how far apart models are against rate, local steps and graph: swarm",
    "quantization": "loss and accuracy against local steps and bits: swarm",
    "adaptive": "whether delay-adaptive steps help adpsgd, swarm and dasgd with a straggler",
}
"""Question by study; the module of the same name answers it."""


class Study(Protocol):
    """Module of a study; its docstring has question, paper, setting, and the expected shape."""

    SEEDS: int
    """Number of seeds of a full run."""

    def samples(self, seeds: int, quick: bool) -> Dataset:
        """Measure with seeds 1 to `seeds`; `quick` is a small version for tests."""

    def summary(self, samples: Dataset) -> Summary:
        """Return what the samples show."""

    def draw(self, samples: Dataset, path: Path) -> Path:
        """Write the picture as PNG and return `path`."""


def find(name: str) -> Study:
    """Return the study called `name`.

    Raises:
        UserError: there is none.
    """
    if name not in STUDIES:
        raise UserError(
            f"study: {name!r} is not known{nearest(name, STUDIES)} (valid: {', '.join(STUDIES)})"
        )
    return cast(Study, importlib.import_module(f"mpi_dasgd.studies.{name}"))


def run(
    name: str,
    out: str | None = None,
    quick: bool = False,
    seeds: int | None = None,
    as_json: bool = False,
    source: str | None = None,
) -> int:
    """Run study `name`, write NAME.h5 and NAME.png, print the table or one JSON object; return 0.

    Args:
        name: name of the study.
        out: directory for the samples and the picture, made if it does not exist.
        quick: measure a smaller version with one seed, in seconds instead of minutes.
        seeds: number of seeds; None for the study's own.
        as_json: print JSON instead of a table.
        source: file with the samples of an earlier run, to be summarized and drawn again.

    Raises:
        UserError: an argument is wrong, or a package is missing.
    """
    study = find(name)
    if seeds is not None and seeds < 1:
        raise UserError(f"study {name}: --seeds must be at least 1, got {seeds}")
    from mpi_dasgd.studies.dataset import read, write

    folder = Path(out or DIRECTORY)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"study: directory {folder} cannot be made ({error.strerror}); "
            "give another one with --out"
        ) from error
    if source is None:
        samples = study.samples(seeds or (1 if quick else study.SEEDS), quick)
        path = write(samples, folder / f"{name}.h5")
    else:
        samples, path = read(source), Path(source)
        if samples.name != name:
            raise UserError(
                f"study {name}: --from: {source} has the samples of study {samples.name!r}"
            )
    rows, figures = study.summary(samples)
    try:
        picture = str(study.draw(samples, folder / f"{name}.png"))
    except ModuleNotFoundError as error:
        raise UserError(
            f"study: the samples are in {path}, but the picture needs the package {error.name!r}: "
            "pip install 'mpi_dasgd[report]'"
        ) from error
    if as_json:
        report = {
            "study": name,
            "rows": rows,
            "figures": figures,
            "samples": str(path),
            "picture": picture,
        }
        print(json.dumps(json_value(report)), flush=True)
        return 0
    print("\n".join([*table(rows), ""]))
    for key, value in figures.items():
        print(f"{key}: {json.dumps(json_value(value, digits=4))}")
    print(f"\nsamples: {path}\npicture: {picture}", flush=True)
    return 0


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table with aligned columns; all rows have the same keys."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(value, str) for value in rows[0].values()]
    return [
        "  ".join(
            cell.ljust(width) if aligned else cell.rjust(width)
            for cell, width, aligned in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    ]


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
