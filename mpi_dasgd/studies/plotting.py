"""Plots of studies: medians with the spread of the seeds, and curves of the theory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from mpi_dasgd.analysis import style
from mpi_dasgd.studies.dataset import spread

__all__ = ["Axes", "band", "draw", "theory", "ticks"]


def draw(path: Path, panels: Callable[[Any], None], columns: int, rows: int = 1) -> Path:
    """Let `panels` draw on the axes of a figure, write it as PNG, and return `path`.

    Args:
        path: file of the picture.
        panels: called with the array of axes, (rows * columns,).
        columns: number of columns of the figure.
        rows: number of rows of the figure.
    """
    with rc_context(style.RC):
        figure = Figure(figsize=(5.3 * columns, 3.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        panels(axes)
        for axis in axes:
            if axis.get_yscale() == "log" and isinstance(
                axis.yaxis.get_major_locator(), LogLocator
            ):
                style.log_ticks(axis)
        figure.savefig(path, format="png", dpi=130)
    return path


def band(
    axes: Axes, x: np.ndarray, values: np.ndarray, index: int, label: str, *, points: bool = True
) -> None:
    """Draw the median over the seeds, and a band from the least to the largest value.

    Args:
        axes: axes to draw on.
        x: abscissas, (points,).
        values: ordinates, (points, seeds); where a run never got there they are infinite or NaN,
            and the band ends at 3 times the median.
        index: number of the curve; it chooses colour and marker.
        label: label in the legend.
        points: whether to mark every point.
    """
    low, middle, high = spread(values)
    good = np.isfinite(middle)
    line: dict[str, Any] = {"color": style.colour(index), "ls": style.dash(index)}
    if points:
        line |= {"marker": style.marker(index), "ms": 5}
    axes.plot(x[good], middle[good], label=label, **line)
    high = np.where(np.isfinite(high), high, 3 * middle)
    axes.fill_between(x[good], low[good], high[good], color=style.colour(index), alpha=0.16, lw=0)


def theory(axes: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    """Draw a curve of the theory, y over x."""
    axes.plot(x, y, color=style.INK, lw=1.2, ls=(0, (5, 2)), label=label, zorder=1)


def ticks(axis: Any, values: np.ndarray) -> None:
    """Label `axis` at `values` only."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
