"""Version vectors of a recorded run; `staleness/version_vectors.py` defines S and U."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.staleness.version_vectors import SetStaleness
from mpi_dasgd.storage.results import Results
from mpi_dasgd.storage.schema import APPLIED

__all__ = ["History", "history"]

_OWN, _APPLIED_HERE, _END = range(3)


@dataclass(frozen=True)
class History:
    """What the version vectors of a run were, measured at the end of each step.

    Attributes:
        time: when the step ended, (steps,), seconds since the start of the run; ascending.
        rank: rank whose step it was, (steps,).
        mean, largest: mean and largest S between this rank and the others, (steps,), in gradients.
        missing: U of this rank, (steps,), in gradients.
        propagation: steps that all ranks together made from a gradient's own step until every
            replica had it, by source and order, (gradients,); -1 if some replica never got it.
        average, maximum: S_avg and S_max, in gradients.
    """

    time: np.ndarray
    rank: np.ndarray
    mean: np.ndarray
    largest: np.ndarray
    missing: np.ndarray
    propagation: np.ndarray
    average: float
    maximum: int


def history(results: Results) -> History:
    """Rebuild the version vectors of all ranks from the results of a run of `dasgd`.

    Ranks without steps are left out, and ranks that were killed while others finished: their
    records end too early. Clocks of ranks may differ a little: a gradient counts as computed no
    later than its first trace.

    Raises:
        UserError: no gradients of other ranks were recorded.
    """
    kept = _kept(results)
    ranks = results.rank[kept].tolist()
    applied = [_applied(results, row) for row in kept]
    if len(ranks) < 2 or not any(len(time) for time, *_ in applied):
        raise UserError(
            "results: expected the records of 'dasgd', found no gradient of another rank applied"
        )
    steps, ends = zip(*(_steps(results, row) for row in kept), strict=True)
    events = _events(ranks, applied, steps, ends)
    event, time, rows, source, version = events
    table = np.zeros((len(ranks), int(results.attributes["world_size"])), np.int64)
    table[:, ranks] = [own[0] - 1 for own in steps]  # more than 0 if the run was resumed
    meter = SetStaleness(table)
    samples = []
    for k, i, j, v in zip(*(a.tolist() for a in (event, rows, source, version)), strict=True):
        if k != _END:
            table[i, j] = max(v, table[i, j])
            continue
        staleness, missing = meter.update(i)
        samples.append((staleness.sum() / (len(ranks) - 1), staleness.max(), missing))
    mean, largest, lacking = np.array(samples).T
    return History(
        time=time[event == _END],
        rank=np.array(ranks)[rows[event == _END]],
        mean=mean,
        largest=largest.astype(np.int64),
        missing=lacking.astype(np.int64),
        propagation=_propagation(ranks, events, steps),
        average=meter.average,
        maximum=meter.maximum,
    )


def _kept(results: Results) -> np.ndarray:
    """Return the rows of the ranks whose records can be used."""
    kept = results.n_records["train"] > 0
    if results.attributes.get("status") == "degraded":
        kept &= results.rank_table["status"] != "killed"
    return np.flatnonzero(kept)


_Applied = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # time, own step, source, version


def _applied(results: Results, row: int) -> _Applied:
    """Return the gradients of others that one rank applied, in order."""
    count, table = results.n_records["exchange"][row], results.tables["exchange"]
    applied = table["kind"][row, :count] == APPLIED
    time, step, source, version = (
        table[name][row, :count][applied] for name in ("time_s", "step", "partner", "partner_step")
    )
    return time, step, source, version


def _steps(results: Results, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the own steps of one rank, and when they ended."""
    count, table = results.n_records["train"][row], results.tables["train"]
    return table["step"][row, :count], table["time_s"][row, :count]


def _events(
    ranks: Sequence[int],
    applied: Sequence[_Applied],
    steps: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
) -> _Events:
    """Return kind, time, row, source and version of all events, in order of time."""
    parts = []
    for row, rank in enumerate(ranks):
        time, step, source, version = applied[row]
        own, end = steps[row], ends[row]
        # applied before its step ended, before what arrived in that step, before others had it
        bounds = [end, _at_first(step, time, own)]
        for other_time, _, other_source, other_version in applied:
            of_it = other_source == rank
            bounds.append(_at_first(other_version[of_it], other_time[of_it], own))
        when = np.minimum.accumulate(np.min(bounds, axis=0)[::-1])[::-1]
        parts += [
            _part(_OWN, when, row, rank, own),
            _part(_APPLIED_HERE, time, row, source, version),
            _part(_END, end, row, rank, own),
        ]
    kind, time, row_, source, version = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    order = np.lexsort((kind, time))
    return kind[order], time[order], row_[order], source[order], version[order]


_Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _part(
    kind: int, time: np.ndarray, row: int, source: np.ndarray | int, version: np.ndarray
) -> _Events:
    full = np.full(len(time), kind), time, np.full(len(time), row)
    return *full, np.broadcast_to(source, len(time)), version


def _at_first(ascending: np.ndarray, values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the value where `ascending` first reaches each of `levels`, infinity if never."""
    return np.append(values, np.inf)[np.searchsorted(ascending, levels)]


def _propagation(ranks: Sequence[int], events: _Events, steps: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each gradient how many steps of all ranks passed until every replica had it."""
    kind, _, row, source, version = events
    issued = np.cumsum(kind == _OWN)  # steps of all ranks so far
    propagation = []
    for k, rank in enumerate(ranks):
        own = issued[(kind == _OWN) & (row == k)]
        last = own.astype(float)
        for i in range(len(ranks)):
            got = (kind == _APPLIED_HERE) & (row == i) & (source == rank)
            if i != k:
                first = _at_first(np.maximum.accumulate(version[got]), issued[got], steps[k])
                last = np.maximum(last, first)
        propagation.append(np.where(np.isfinite(last), last - own, -1).astype(np.int64))
    return np.concatenate(propagation)
