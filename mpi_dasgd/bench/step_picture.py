"""Picture of `bench step`: each arm's speed in relation to `alone`, median and quartiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpi_dasgd.analysis import style
from mpi_dasgd.bench.step_job import ARMS, REFERENCE

__all__ = ["draw"]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a PNG with one panel per task and optimizer, and return `path`.

    Args:
        rows: rows of `mpi_dasgd.bench.step_report.summarize`.
        path: file of the picture.
    """
    rows = [row for row in rows if row.get("share_of_alone") is not None]
    present = {row["arm"] for row in rows}
    arms = [arm for arm in ARMS if arm in present and arm != REFERENCE]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    jobs = list(dict.fromkeys((row["ranks"], row["straggler"]) for row in rows))
    with rc_context(style.RC):
        height = 1.3 + 0.16 * max(1, len(arms)) * (len(jobs) + 1)
        figure = Figure(
            figsize=(5.3 * len(optimizers) + 0.6, height * len(tasks) + 0.5), layout="constrained"
        )
        grid = figure.subplots(len(tasks), len(optimizers), squeeze=False, sharey=True)
        for task, line in zip(tasks, grid, strict=True):
            for optimizer, axes in zip(optimizers, line, strict=True):
                chosen = [r for r in rows if (r["task"], r["optimizer"]) == (task, optimizer)]
                _panel(axes, chosen, arms, jobs)
                axes.set_title(f"{task}, {optimizer}")
        grid[0, 0].set_yticks(range(len(arms)), arms)
        grid[0, 0].set_ylim(len(arms) - 0.5, -0.5)
        handles = [
            Line2D([], [], color=style.colour(i), marker=style.marker(i), ms=5, label=_label(*job))
            for i, job in enumerate(jobs)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(jobs)))
        for axes in grid[-1]:
            axes.set_xlabel(f"speed, {REFERENCE} = 1: median and quartiles of paired rounds")
        figure.savefig(path, format="png", dpi=110)
    return path


def _label(ranks: int, straggler: str) -> str:
    slow = "" if straggler == "none" else f", one {straggler[1:]}x slower"
    return f"{ranks} ranks{slow}"


def _panel(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    jobs: Sequence[tuple[int, str]],
) -> None:
    axes.axvline(1.0, color=style.MUTED, lw=1)
    for row in rows:
        if row["arm"] not in arms:
            continue
        index = jobs.index((row["ranks"], row["straggler"]))
        y = arms.index(row["arm"]) + (index - (len(jobs) - 1) / 2) * 0.8 / len(jobs)
        q1, median, q3 = (row[f"share_of_alone{part}"] for part in ("_q1", "", "_q3"))
        axes.plot([q1, q3], [y, y], color=style.colour(index), lw=2)
        axes.plot(median, y, style.marker(index), color=style.colour(index), ms=5)
    axes.set_xlim(left=0)
