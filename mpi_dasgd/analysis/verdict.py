"""Verdict on the runs in words: how fast which accuracy was reached, and what failed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mpi_dasgd.analysis.run import Run
from mpi_dasgd.errors import UserError

__all__ = ["common_target", "labels", "shorten", "verdict"]


def labels(runs: Sequence[Run]) -> list[str]:
    """Return one distinct label per run: its name, with its folder or a number where names repeat.

    Raises:
        UserError: if there are no runs.
    """
    if not runs:
        raise UserError("runs: expected at least one run, got none; give run directories")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name} #{seen[name]}" if name in repeated else name)
    return unique


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Return the names cut to `width` characters so that they stay distinct if they can."""
    starts = [name if len(name) <= width else name[: width - 1] + "…" for name in names]
    ends = [name if len(name) <= width else "…" + name[1 - width :] for name in names]
    return ends if len(set(ends)) > len(set(starts)) else starts


def common_target(runs: Sequence[Run]) -> float | None:
    """Return the highest whole per cent of accuracy that every rank of every run reached.

    None if a run has no accuracies (a regression, or no evaluation yet).
    """
    reached = []
    for run in runs:
        worst = run.evaluations().worst
        if not len(worst) or math.isnan(worst.max()):
            return None
        reached.append(float(worst.max()))
    return math.floor(min(reached) * 100 + 1e-9) / 100


def verdict(runs: Sequence[Run]) -> str:
    """Return two or three sentences that sum up the runs."""
    sentences = [_comparison(runs) if len(runs) > 1 else _single(runs[0])]
    for run, label in zip(runs, labels(runs), strict=True):
        who = "The run" if len(runs) == 1 else label
        if run.results.lost:
            ranks = ", ".join(map(str, sorted(run.results.lost)))
            sentences.append(f"{who} lost the files of rank {ranks}.")
        status = run.results.attributes["status"]
        if status != "finished" and not (run.results.lost and status == "degraded"):
            sentences.append(f"{who} {_ENDED[status]}.")
    return " ".join(sentences)


_ENDED = {
    "failed": "failed: at least one rank ended with an error",
    "degraded": "ended without all of its ranks",
    "killed": "was killed before it ended",
    "running": "has not ended: it is live, or was killed",
}


def _single(run: Run) -> str:
    figures = run.summary()
    speed = figures["samples_per_s"]
    text = (
        f"{figures['ranks']} ranks processed {figures['samples']:,} samples in "
        f"{seconds(figures['wall_s'])}" + (f" ({speed:,.0f} samples/s)." if speed else ".")
    )
    accuracies = [
        f"{who} {100 * value:.1f} %"
        for who, value in (
            ("the mean of all models", figures["test_accuracy"]),
            ("the worst rank", figures["worst_rank_accuracy"]),
        )
        if value is not None
    ]
    return text + (f" Test accuracy: {', '.join(accuracies)}." if accuracies else "")


def _comparison(runs: Sequence[Run]) -> str:
    """Rank the runs by the time after which all ranks had a common accuracy, or by throughput."""
    names = labels(runs)
    target = common_target(runs)
    if target is None or target <= 0:
        speeds = [
            (run.summary()["samples_per_s"] or 0.0, name)
            for run, name in zip(runs, names, strict=True)
        ]
        (best, first), *others = sorted(speeds, reverse=True)
        rest = _some([f"{name} {value:,.0f}" for value, name in others])
        return f"{first} is the fastest with {best:,.0f} samples/s ({rest})."
    times = []
    for run, name in zip(runs, names, strict=True):
        worst = run.seconds_to(target).worst
        times.append((worst or math.inf, name))  # every run has reached it, see common_target
    (best, first), *others = sorted(times)
    rest = _some([f"{name} after {seconds(t)} ({t / best:.1f}x)" for t, name in others])
    return (
        f"{first} is the first with {100 * target:.0f} % test accuracy on every rank, "
        f"after {seconds(best)}; {rest}."
    )


def _some(texts: Sequence[str], most: int = 4) -> str:
    """Join the first `most` texts, and count the others."""
    others = [f"{len(texts) - most} more later"] if len(texts) > most else []
    return ", ".join([*texts[:most], *others])


def seconds(value: float) -> str:
    """Return a duration in s, min or h."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if value >= 3 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
