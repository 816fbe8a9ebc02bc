"""Report of `bench step`: paired ratios of the arms, as rows, text and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpi_dasgd.bench.sample_store import Quartiles, quartiles
from mpi_dasgd.bench.step_job import ARMS, FUSED_REFERENCE, IDLE, REFERENCE

__all__ = ["LEGEND", "SCENARIO", "markdown", "summarize", "table", "title"]

SCENARIO = ("task", "ranks", "straggler", "optimizer")
"""Columns that tell which rows belong to one job."""

LEGEND = f"""\
ms: of a step of the ranks that are not slowed, median of the rounds; after: what of it is behind
the gradient, optimizer and exchange (`ddp` exchanges before); CPU: of all threads of the process
/{REFERENCE}, /{FUSED_REFERENCE}: quartiles of the speed in relation to theirs in the same round
CPU beside them: the median by CPU times, for a machine that other programs use, too
busy: share of all cores that the job keeps busy; slow: of one core, by the straggler
sent: messages of a rank per step"""


def summarize(columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one row per job and arm, and one for `IDLE`, in the order of the jobs.

    Times and ratios are those of the ranks that are not slowed, all together. A ratio divides the
    reference's time by the arm's, both of one round; there is none if the reference was not
    measured. Those of CPU times, of all threads of the process, say what a step costs where other
    programs take part of the cores; ranks that wait inside MPI spend them, too.

    Args:
        columns: raw samples, as `mpi_dasgd.bench.step` stores them.
    """
    keys = list(zip(*(columns[name].tolist() for name in SCENARIO), strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    job_of = np.array([numbers[key] for key in keys])
    rows = []
    for key, number in numbers.items():
        job = {name: np.asarray(values)[job_of == number] for name, values in columns.items()}
        step_seconds = {arm: _per_round(job, arm, "seconds") for arm in ARMS}
        cpu_seconds = {arm: _per_round(job, arm, "cpu_seconds") for arm in ARMS}
        scenario = dict(zip(SCENARIO, key, strict=True))
        for arm, seconds in step_seconds.items():
            if not seconds:
                continue
            row = {**scenario, "arm": arm, "rounds": len(seconds)}
            row |= {
                "step_ms": _median_ms(seconds),
                "update_ms": _median_ms(_per_round(job, arm, "update_seconds")),
                "cpu_ms": _median_ms(cpu_seconds[arm]),
            }
            for name, reference in (("alone", REFERENCE), ("alone_fused", FUSED_REFERENCE)):
                shares = _ratios(step_seconds[reference], seconds)
                row |= {f"share_of_{name}{part}": value for part, value in shares.items()}
                shares = _ratios(cpu_seconds[reference], cpu_seconds[arm])
                row |= {f"cpu_share_of_{name}{part}": value for part, value in shares.items()}
            rows.append({**row, **_load(job, arm)})
        rows.append({**scenario, "arm": IDLE, **_load(job, IDLE)})
    return rows


def _per_round(job: Mapping[str, np.ndarray], arm: str, column: str) -> dict[int, float]:
    """Return a column per step of the ranks that are compared, by round."""
    chosen = (job["arm"] == arm) & ~job["slow"].astype(bool)
    rounds, position = np.unique(job["round"][chosen], return_inverse=True)
    total = np.bincount(position, job[column][chosen], len(rounds))
    steps = np.bincount(position, job["steps"][chosen], len(rounds))
    return dict(zip(rounds.tolist(), (total / steps).tolist(), strict=True))


def _median_ms(seconds: Mapping[int, float]) -> float:
    return 1e3 * float(np.median(list(seconds.values())))


def _ratios(reference: Mapping[int, float], seconds: Mapping[int, float]) -> dict[str, Any]:
    """Return the quartiles of the paired ratios, by the end of their column's name."""
    ratios = [reference[number] / seconds[number] for number in seconds if number in reference]
    found = quartiles(ratios) if ratios else Quartiles(math.nan, math.nan, math.nan)
    values = {"_q1": found.q1, "": found.median, "_q3": found.q3}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _load(job: Mapping[str, np.ndarray], arm: str) -> dict[str, Any]:
    """Return what the ranks of an arm keep busy, over all its slices."""
    chosen = job["arm"] == arm
    slow, ranks = chosen & job["slow"].astype(bool), len(np.unique(job["rank"]))
    cores = float(job["cores"][0])

    def busy(rows: np.ndarray) -> float | None:
        seconds = float(job["seconds"][rows].sum())
        return float(job["cpu_seconds"][rows].sum()) / seconds if seconds else None

    share, steps = busy(chosen), int(job["steps"][chosen].sum())
    return {
        "cpu_busy": None if share is None else share * ranks / cores,
        "slow_busy": busy(slow),
        "messages_per_step": float(job["messages"][chosen].sum()) / steps if steps else None,
    }


def title(row: Mapping[str, Any]) -> str:
    """Return the name of the job that a row belongs to."""
    slow = "" if row["straggler"] == "none" else f", one {row['straggler'][1:]}x slower"
    return f"{row['task']} {row['optimizer']}, {row['ranks']} ranks{slow}"


_TIMES, _SHARES, _LOAD = (
    {"ms": "step_ms", "after": "update_ms", "CPU": "cpu_ms"},
    {f"/{REFERENCE}": "alone", f"/{FUSED_REFERENCE}": "alone_fused"},
    {"busy": "cpu_busy", "slow": "slow_busy", "sent": "messages_per_step"},
)
"""Columns of the printed table: their heads, and the keys, or parts of keys, of a row."""


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the printed table, given the rows of `summarize`."""
    lines, previous = [], ""
    for row in rows:
        if (name := title(row)) != previous:
            heads = "".join(f"{head:>9}" for head in _TIMES)
            heads += "".join(f"{head:>21}{'CPU':>7}" for head in _SHARES)
            heads += "".join(f"{head:>7}" for head in _LOAD)
            lines += [f"{name} ({row['rounds']} rounds)", f"  {'':<15}{heads}"]
        previous = name
        line = f"  {row['arm']:<15}"
        line += "".join(_text(row.get(key), ".3f", 9) for key in _TIMES.values())
        for name in _SHARES.values():
            keys = [f"share_of_{name}{part}" for part in ("_q1", "", "_q3")]
            keys.append(f"cpu_share_of_{name}")
            line += "".join(_text(row.get(key), ".3f", 7) for key in keys)
        lines.append(line + "".join(_text(row[key], ".2f", 7) for key in _LOAD.values()))
    return lines


def _text(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: the median share of `REFERENCE`, and its quartiles."""
    present = {row["arm"] for row in rows}
    arms = [arm for arm in ARMS if arm in present and arm != REFERENCE]
    lines = [
        f"| | step of `{REFERENCE}` | {' | '.join(f'`{arm}`' for arm in arms)} |",
        f"| {' | '.join(['---'] * (len(arms) + 2))} |",
    ]
    jobs: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        jobs.setdefault(title(row), {})[row["arm"]] = row
    for name, by_arm in jobs.items():
        cells = [name, f"{by_arm[REFERENCE]['step_ms']:.3g} ms"]
        for arm in arms:
            row = by_arm.get(arm, {})
            low, middle, high = (row.get(f"share_of_alone{part}") for part in ("_q1", "", "_q3"))
            cells.append("-" if middle is None else f"**{middle:.2f}** ({low:.2f} .. {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
