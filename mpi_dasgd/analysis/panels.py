"""Panels of the figures: each draws one quantity of all runs into given axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mpi_dasgd.analysis import style
from mpi_dasgd.analysis.run import Run
from mpi_dasgd.analysis.verdict import shorten

__all__ = [
    "Panel",
    "accuracy_by_samples",
    "accuracy_by_time",
    "consensus",
    "delay",
    "loss_by_samples",
    "loss_by_time",
    "staleness",
    "test_loss_by_time",
    "throughput",
    "time_split",
    "traffic",
]

SAMPLES = "samples, all ranks"
SECONDS = "wall time [s]"

# Draws the runs; False if none of them has the data, and then nothing is drawn.
Panel = Callable[[Axes, Sequence[Run], Sequence[str]], bool]


def loss_by_samples(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the training loss against samples, mean over the batches of all ranks."""
    axes.xaxis.set_major_formatter(style.engineering())
    return _loss(axes, runs, "total_samples", SAMPLES)


def loss_by_time(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the training loss against wall time, mean over the batches of all ranks."""
    return _loss(axes, runs, "time_s", SECONDS)


def _loss(axes: Axes, runs: Sequence[Run], x: str, label: str) -> bool:
    drawn = []
    for index, run in enumerate(runs):
        where, loss = style.binned(run.column("train", x), run.column("train", "loss"))
        axes.plot(where, loss, color=style.colour(index), ls=style.dash(index))
        drawn.append(loss[np.isfinite(loss)])
    values = np.concatenate(drawn)
    if not len(values):
        return False
    _log_if_wide(axes, values)
    axes.set(xlabel=label, ylabel="training loss", title="Training loss", xlim=(0, None))
    return True


def accuracy_by_samples(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw test accuracy against samples: mean model, worst rank, and the band to the best rank."""
    axes.xaxis.set_major_formatter(style.engineering())
    return _accuracy(axes, runs, "samples", SAMPLES)


def accuracy_by_time(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw test accuracy against wall time: mean model, worst rank, band to the best rank."""
    return _accuracy(axes, runs, "seconds", SECONDS)


def test_loss_by_time(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the test loss of the mean model against wall time."""
    drawn = []
    for index, run in enumerate(runs):
        table = run.results.consensus
        if "mean_test_loss" not in table or "time_s" not in table:
            continue
        loss = table["mean_test_loss"]
        axes.plot(
            table["time_s"], loss, color=style.colour(index), marker=style.marker(index), ms=3.5
        )
        drawn.append(loss[np.isfinite(loss)])
    if not sum(map(len, drawn)):
        return False
    _log_if_wide(axes, np.concatenate(drawn))
    axes.set(xlabel=SECONDS, ylabel="test loss", title="Test loss, mean model", xlim=(0, None))
    return True


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    """Make the y axis logarithmic if the values span more than a factor of five."""
    if values.min() > 0 and values.max() > 5 * values.min():
        axes.set_yscale("log")
        style.log_ticks(axes)


def _accuracy(axes: Axes, runs: Sequence[Run], x: str, label: str) -> bool:
    seen: list[np.ndarray] = []
    for index, run in enumerate(runs):
        curves = run.evaluations()
        if not np.isfinite(curves.worst).any():
            continue
        where, colour = getattr(curves, x), style.colour(index)
        axes.fill_between(where, curves.worst, curves.best, color=colour, alpha=0.13, lw=0)
        axes.plot(where, curves.worst, color=colour, ls=(0, (3, 1.6)), lw=1.3)
        axes.plot(where, curves.mean, color=colour, marker=style.marker(index), ms=3.5)
        seen.append(curves.worst[np.isfinite(curves.worst)])
    if not seen:
        return False
    # The first steep rise would leave no room for the differences that matter.
    lowest = float(np.percentile(np.concatenate(seen), 12))
    axes.set_ylim(bottom=lowest - 0.05 * (axes.get_ylim()[1] - lowest))
    key = [
        Line2D([], [], color=style.MUTED, marker="o", ms=3.5, label="mean of all models"),
        Line2D([], [], color=style.MUTED, ls=(0, (3, 1.6)), lw=1.3, label="worst rank"),
    ]
    axes.legend(handles=key, loc="lower right")
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(style.per_cent())
    axes.set(xlabel=label, ylabel="test accuracy [%]", title="Test accuracy", xlim=(0, None))
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    return True


def throughput(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the samples per second of each rank."""
    width = 0.8 / len(runs)
    most = max(len(run.results.rank) for run in runs)
    for index, run in enumerate(runs):
        speed = run.results.rank_table["samples_per_s"].astype(float)
        rank, colour = run.results.rank, style.colour(index)
        if most <= 24:
            shift = (index - (len(runs) - 1) / 2) * width
            axes.bar(rank + shift, speed, width * 0.9, color=colour)
        else:
            axes.plot(rank, speed, color=colour, lw=0, marker=style.marker(index), ms=3)
    if most <= 24:
        axes.set_xticks(range(max(int(run.results.rank.max()) for run in runs) + 1))
        axes.grid(axis="x", visible=False)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(style.engineering())
    axes.set(xlabel="rank", ylabel="samples / s", title="Throughput of each rank")
    return True


def staleness(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw how many steps the received states lagged behind, as a share of the exchanges."""
    if not _histogram(axes, [run.ages() for run in runs]):
        return False
    axes.axvline(0, color=style.MUTED, lw=0.8, ls=":")
    axes.set(
        xlabel="steps the partner's state lagged behind",
        ylabel="share of exchanges [%]",
        title="Staleness",
    )
    return True


def delay(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the delays, in gradients of other ranks, as a share of the gradients."""
    if not _histogram(axes, [run.delays() for run in runs]):
        return False
    axes.set(
        xlabel="gradients of other ranks since the model was taken",
        ylabel="share of gradients [%]",
        title="Delay",
    )
    return True


def _histogram(axes: Axes, values: Sequence[np.ndarray]) -> bool:
    """Draw the shares of whole numbers, one outline per run."""
    drawn = [(index, counts) for index, counts in enumerate(values) if len(counts)]
    if not drawn:
        return False
    everything = np.concatenate([counts for _, counts in drawn])
    low, high = map(int, np.percentile(everything, (0.25, 99.75), method="nearest"))
    step = max(1, (high - low) // 60)  # at most about 60 bars of whole steps
    edges = np.arange(low, high + 2 * step, step) - 0.5
    for index, counts in drawn:
        share = np.histogram(counts, edges)[0] / len(counts)
        axes.stairs(share, edges, color=style.colour(index), lw=1.6)
        if len(drawn) <= 3:
            axes.stairs(share, edges, color=style.colour(index), fill=True, alpha=0.18)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(style.per_cent())
    return True


def consensus(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the distance of the models from their mean, relative to the norm of the mean."""
    drawn = []
    for index, run in enumerate(runs):
        table = run.results.consensus
        if "consensus_relative" not in table or "total_samples" not in table:
            continue
        positive = table["consensus_relative"] > 0  # the axis is logarithmic
        where, values = table["total_samples"][positive], table["consensus_relative"][positive]
        axes.plot(where, values, color=style.colour(index), marker=style.marker(index), ms=3.5)
        drawn.append(values)
    if not sum(map(len, drawn)):
        return False
    axes.set_yscale("log")
    style.log_ticks(axes)
    axes.xaxis.set_major_formatter(style.engineering())
    axes.set(
        xlabel=SAMPLES,
        ylabel=r"mean $\|x_i-\bar x\|^2\ /\ \|\bar x\|^2$",
        title="Consensus distance",
        xlim=(0, None),
    )
    return True


def traffic(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the payload moved by all ranks; one mark at the end where only the total is known."""
    drawn = False
    for index, run in enumerate(runs):
        time, moved = run.column("exchange", "time_s"), run.column("exchange", "bytes")
        wall, total = float(run.results.rank_table["wall_s"].max()), run.summary()["bytes_sent"]
        colour = style.colour(index)
        if len(time):
            order = np.argsort(time, kind="stable")
            seconds = np.linspace(0, wall, 100)
            count = np.searchsorted(time[order], seconds, side="right")
            sums = np.concatenate([[0], np.cumsum(moved[order])])
            axes.plot(seconds, sums[count], color=colour, ls=style.dash(index))
        elif total:
            axes.plot(wall, total, color=colour, lw=0, marker=style.marker(index), ms=7)
            axes.set_xmargin(0.08)
        drawn |= bool(len(time) or total)
    if not drawn:
        return False
    axes.yaxis.set_major_formatter(style.engineering("B"))
    axes.set(xlabel=SECONDS, ylabel="payload moved, all ranks", title="Traffic", xlim=(0, None))
    axes.set_ylim(bottom=0)
    return True


def time_split(axes: Axes, runs: Sequence[Run], names: Sequence[str]) -> bool:
    """Draw the shares of the ranks' step time in computing, exchanging and waiting."""
    parts = ("compute_s", "exchange_s", "wait_s")
    totals = np.array([[np.nansum(run.column("train", part)) for part in parts] for run in runs])
    if not (totals.sum(axis=1) > 0).all():
        return False
    shares = totals / totals.sum(axis=1, keepdims=True)
    rows = np.arange(len(runs))
    left = np.zeros(len(runs))
    names_and_fills = zip(("compute", "exchange", "wait"), style.PARTS, strict=True)
    for part, (name, fill) in enumerate(names_and_fills):
        axes.barh(rows, shares[:, part], 0.62, left, color=fill, label=name)
        for row, share in enumerate(shares[:, part]):
            if share > 0.06:
                ink = "white" if part == 0 else style.INK
                middle = left[row] + share / 2
                axes.text(middle, row, f"{share:.0%}", ha="center", va="center", color=ink, size=8)
        left += shares[:, part]
    axes.set_yticks(rows, shorten(names, 16))
    half = max(len(runs), 2.5) / 2  # one bar alone would be a block
    axes.set_ylim((len(runs) - 1) / 2 + half, (len(runs) - 1) / 2 - half)
    axes.grid(False)
    axes.xaxis.set_major_formatter(style.per_cent())
    axes.set(xlabel="share of step time [%]", title="Step time", xlim=(0, 1))
    axes.legend(
        ncols=3, loc="lower right", bbox_to_anchor=(1.02, 0.985), handlelength=1, columnspacing=1
    )
    return True
