"""Style of the figures: one colour per run, distinct for colour-blind readers, on white."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

__all__ = [
    "INK",
    "MUTED",
    "PARTS",
    "RC",
    "binned",
    "colour",
    "dash",
    "empty",
    "engineering",
    "marker",
    "per_cent",
]

INK, MUTED, GRID = "#1f2933", "#66717d", "#e4e8ec"

# Okabe & Ito, without their yellow (too faint on white), and with grey for black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b6570")
MARKERS = "osD^vP*X"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
# Compute, exchange, wait: dark to light, so that they also differ in print.
PARTS = ("#2b4c6f", "#7fa8c9", "#f0b27a")

RC: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#b8c0c8",
    "axes.formatter.use_mathtext": True,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "mpi_dasgd",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


def colour(index: int) -> str:
    """Return the colour of the run of this index, the same in every figure."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Return the marker of the run of this index, for readers who cannot tell the colours."""
    return MARKERS[index % len(MARKERS)]


def dash(index: int) -> Any:
    """Return the line style of the run of this index: it changes where the colours repeat."""
    return DASHES[index // len(COLOURS) % len(DASHES)]


def engineering(unit: str = "") -> EngFormatter:
    """Return a tick formatter such as 120k or 3M, or 2 GB with a unit."""
    return EngFormatter(unit=unit, sep=" " if unit else "")


def per_cent() -> FuncFormatter:
    """Return a tick formatter of fractions as per cent, without the sign."""
    return FuncFormatter(lambda value, _: f"{100 * value:.4g}")


def binned(x: np.ndarray, y: np.ndarray, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of `x` and `y` in `bins` equal intervals of `x`; empty ones are left out."""
    if not len(x):
        return x, y
    edges = np.linspace(x.min(), x.max(), bins + 1)
    index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    filled = count > 0
    return (
        np.bincount(index, x, bins)[filled] / count[filled],
        np.bincount(index, y, bins)[filled] / count[filled],
    )


def log_ticks(axes: Axes) -> None:
    """Label a logarithmic y axis at 1, 2 and 5 where it spans less than two decades."""
    low, high = axes.get_ylim()
    if high / low < 100:
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        ticks = [tick for tick in np.outer(decades, (1, 2, 5)).ravel() if low <= tick <= high]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def empty(axes: Axes, why: str) -> None:
    """Write into an empty panel why it is empty."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=MUTED)
