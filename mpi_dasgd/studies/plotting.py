"""How the figures of studies are drawn: the median over seeds with its spread, and the theory's curve."""

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
    """Let `panels` draw on the axes of a figure of so many columns and rows, and write it as PNG.

    Args:
        path: of the picture.
        panels: called with an array of axes, (rows * columns,).
        columns, rows: of the figure.
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
    """Draw the median of `values` over their last dimension and the band between the least and the largest.

    Args:
        axes: to draw on.
        x: (points,).
        values: (points, seeds); infinite or NaN where a run never got there: drawn as 3 times the median.
        index: chooses colour and marker.
        label: for the legend.
        points: whether to mark every point.
    """
    low, middle, high = spread(values)
    good = np.isfinite(middle)
    look: dict[str, Any] = {"color": style.colour(index), "ls": style.dash(index)}
    if points:
        look |= {"marker": style.marker(index), "ms": 5}
    axes.plot(x[good], middle[good], label=label, **look)
    high = np.where(np.isfinite(high), high, 3 * middle)
    axes.fill_between(x[good], low[good], high[good], color=style.colour(index), alpha=0.16, lw=0)


def theory(axes: Axes, x: np.ndarray, y: np.ndarray, label: str) -> None:
    """Draw what theory says."""
    axes.plot(x, y, color=style.INK, lw=1.2, ls=(0, (5, 2)), label=label, zorder=1)


def ticks(axis: Any, values: np.ndarray) -> None:
    """Label an axis at `values` and nowhere else."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
