"""Figures of runs: one per topic for the page, and all topics in one overview picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpi_dasgd.analysis import panels, style
from mpi_dasgd.analysis.run import Run
from mpi_dasgd.analysis.verdict import labels, shorten, verdict

__all__ = ["Topic", "figures", "overview"]


class Topic(NamedTuple):
    """A figure: its title, what it shows in one line, and the panel that draws it."""

    title: str
    caption: str
    panel: panels.Panel


ACCURACY = (
    "Solid: the mean of all models; dashed: the worst rank; the band reaches to the best rank."
)
TOPICS = (
    Topic(
        "Accuracy by samples",
        f"Test accuracy against the samples of all ranks. {ACCURACY}",
        panels.accuracy_by_samples,
    ),
    Topic(
        "Accuracy by time",
        f"Test accuracy against wall time. {ACCURACY}",
        panels.accuracy_by_time,
    ),
    Topic(
        "Training loss by samples",
        "Training loss against the samples of all ranks, averaged over the batches of all ranks.",
        panels.loss_by_samples,
    ),
    Topic(
        "Training loss by time",
        "Training loss against wall time, averaged over the batches of all ranks.",
        panels.loss_by_time,
    ),
    Topic(
        "Test loss",
        "Test loss of the mean of all models against wall time.",
        panels.test_loss_by_time,
    ),
    Topic(
        "Throughput",
        "Samples per second of each rank over the whole run: a straggler stands out.",
        panels.throughput,
    ),
    Topic(
        "Step time",
        "How the ranks' step time divides into computing, exchanging and waiting for others.",
        panels.time_split,
    ),
    Topic(
        "Staleness",
        "How many steps old what a partner sent was when it was used; negative: it was ahead.",
        panels.staleness,
    ),
    Topic(
        "Delay",
        "Gradients that other ranks computed between a gradient's model and its use.",
        panels.delay,
    ),
    Topic(
        "Consensus distance",
        "Mean squared distance of the ranks' models from their mean, relative to the mean's norm.",
        panels.consensus,
    ),
    Topic(
        "Traffic",
        "Payload counted at the calls of all ranks; a single mark where only the total is known.",
        panels.traffic,
    ),
)
OVERVIEW = (
    *("Accuracy by samples", "Accuracy by time", "Throughput"),
    *("Training loss by samples", "Training loss by time", "Step time"),
    *("Staleness", "Consensus distance", "Traffic"),
)
LEGEND_COLUMNS = 5
NOT_RECORDED = "not recorded by these runs"


def figures(runs: Sequence[Run]) -> list[tuple[Topic, str | None]]:
    """Return every topic with its figure as an SVG document, or None if no run has its data."""
    names = labels(runs)
    drawn: list[tuple[Topic, str | None]] = []
    with rc_context(style.RC):
        for topic in TOPICS:
            figure = Figure(figsize=(5.3, 3.9), layout="constrained")
            if not topic.panel(figure.subplots(), runs, names):
                drawn.append((topic, None))
                continue
            if len(runs) > 1 and topic.panel is not panels.time_split:
                columns = 3 if max(map(len, names)) < 15 else 2
                figure.legend(
                    handles=_handles(shorten(names, 26)),
                    loc="outside upper left",
                    ncols=min(columns, len(names)),
                    columnspacing=1.4,
                    borderaxespad=0.2,
                )
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            drawn.append((topic, svg.getvalue()))
    return drawn


def overview(runs: Sequence[Run], path: Path) -> Path:
    """Write one PNG with all panels, the names of the runs and the verdict."""
    names = labels(runs)
    with rc_context(style.RC):
        figure = Figure(figsize=(15, 12.2))
        words = textwrap.fill(verdict(runs), 155, max_lines=3, placeholder=" …")
        under_words = 0.938 - 0.0205 * (words.count("\n") + 1)
        rows = -(-len(runs) // LEGEND_COLUMNS) if len(runs) > 1 else 0
        top = under_words - 0.022 * rows - 0.018
        figure.set_layout_engine(
            "constrained", rect=(0.012, 0.012, 0.976, top), w_pad=0.14, h_pad=0.16
        )
        topics = {topic.title: topic for topic in TOPICS}
        for axes, title in zip(figure.subplots(3, 3).flat, OVERVIEW, strict=True):
            if not topics[title].panel(axes, runs, names):
                style.empty(axes, NOT_RECORDED)
                axes.set_title(title)
        heading = names[0] if len(names) == 1 else f"{len(names)} runs"
        figure.text(0.022, 0.965, heading, size=19, weight="bold", va="center")
        figure.text(0.022, 0.944, words, size=11.5, color=style.MUTED, va="top", linespacing=1.45)
        if len(runs) > 1:
            figure.legend(
                handles=_handles(shorten(names, 24)),
                loc="upper left",
                bbox_to_anchor=(0.015, under_words),
                ncols=min(len(names), LEGEND_COLUMNS),
                fontsize=11,
            )
        figure.savefig(path, format="png", dpi=110)
    return path


def _handles(names: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=style.colour(i), marker=style.marker(i), ms=5, lw=2.2, label=name)
        for i, name in enumerate(names)
    ]
