"""The figures of several runs side by side, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mpi_dasgd.analysis.run import Run
from mpi_dasgd.analysis.verdict import common_target, labels, shorten

__all__ = ["Line", "lines", "report_json", "summary_table"]

NOT_MEASURED = "-"


class Line(NamedTuple):
    """One figure of all runs: its name, unit, texts, and which run is the best, if one is."""

    name: str
    unit: str
    texts: list[str]
    best: int | None


# Key of the summary, name, unit, format in that unit, and which end is better (1 high, -1 low).
FIGURES: tuple[tuple[str, str, str, Callable[[Any], str], int], ...] = (
    ("algorithm", "algorithm", "", str, 0),
    ("codec", "codec", "", str, 0),
    ("topology", "topology", "", str, 0),
    ("status", "status", "", str, 0),
    ("ranks", "ranks", "", "{:d}".format, 0),
    ("samples", "samples", "", "{:,d}".format, 0),
    ("wall_s", "wall time", "s", "{:,.2f}".format, 0),
    ("samples_per_s", "throughput", "samples/s", "{:,.0f}".format, 1),
    ("test_loss", "test loss, mean model", "", "{:.4g}".format, -1),
    ("test_accuracy", "accuracy, mean model", "%", lambda value: f"{100 * value:.2f}", 1),
    ("worst_rank_accuracy", "accuracy, worst rank", "%", lambda value: f"{100 * value:.2f}", 1),
    ("seconds_mean", "to {target}, mean model", "s", "{:,.2f}".format, -1),
    ("seconds_worst", "to {target}, worst rank", "s", "{:,.2f}".format, -1),
    ("staleness_mean", "staleness, mean", "steps", "{:,.2f}".format, 0),
    ("staleness_max", "staleness, max", "steps", "{:,d}".format, 0),
    ("delay_mean", "delay, mean", "gradients", "{:,.2f}".format, 0),
    ("delay_max", "delay, max", "gradients", "{:,d}".format, 0),
    ("delay_factor_mean", "step by the delay rule", "", "{:.3f}".format, 0),
    ("bytes_per_exchange", "payload per exchange", "kB", lambda value: f"{value / 1e3:,.2f}", 0),
    ("bytes_sent", "payload sent, total", "MB", lambda value: f"{value / 1e6:,.2f}", 0),
    ("consensus_distance", "consensus distance", "", "{:.3g}".format, -1),
)


def lines(runs: Sequence[Run]) -> list[Line]:
    """Return the figures of the runs; those that no run has are left out."""
    target = common_target(runs)
    summaries = []
    for run in runs:
        mean, worst = run.seconds_to(target) if target else (None, None)
        summaries.append(run.summary() | {"seconds_mean": mean, "seconds_worst": worst})
    rows = []
    for key, name, unit, text, better in FIGURES:
        values = [summary[key] for summary in summaries]
        if all(value is None for value in values):
            continue
        name = name.format(target=f"{100 * target:.0f} %" if target else "")
        texts = [NOT_MEASURED if value is None else text(value) for value in values]
        rows.append(Line(name, unit, texts, _best(values, better)))
    return rows


def summary_table(runs: Sequence[Run], width: int = 100) -> str:
    """Return a plain-text table, one column per run, in as many blocks as `width` characters need.

    Raises:
        UserError: if there are no runs.
    """
    names = labels(runs)
    rows = lines(runs)
    heads = [f"{row.name} [{row.unit}]" if row.unit else row.name for row in rows]
    head_width = max(map(len, heads))
    cells = max(12, *(len(text) for row in rows for text in row.texts))
    column = min(max(cells, *map(len, names)), max(cells, 16))
    per_block = max(1, (width - head_width) // (column + 2))
    blocks = []
    for start in range(0, len(runs), per_block):
        chosen = slice(start, start + per_block)
        block = [" " * head_width + _cells(shorten(names, column)[chosen], column)]
        block.append("-" * len(block[0]))
        for head, row in zip(heads, rows, strict=True):
            block.append(head.ljust(head_width) + _cells(row.texts[chosen], column))
        blocks.append("\n".join(block))
    return "\n\n".join(blocks) + "\n"


def report_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the report of each run as a dictionary that JSON can hold."""
    return [run.report() for run in runs]


def _best(values: Sequence[Any], better: int) -> int | None:
    """Return the index of the one best of at least two values."""
    known = [(better * value, index) for index, value in enumerate(values) if value is not None]
    if not better or len(known) < 2:
        return None
    known.sort(reverse=True)
    return known[0][1] if known[0][0] > known[1][0] else None


def _cells(texts: Sequence[str], width: int) -> str:
    return "".join("  " + text.rjust(width) for text in texts)
