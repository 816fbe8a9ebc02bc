"""Version vectors: how much the gradient sets of two replicas differ (Tosi, Theobald; arXiv 2309.03754).

G_i is the set of gradients in replica i, V_i[k] how many of them are of rank k. Each source's gradients are
applied in its order, so that the sets are prefixes, and exactly

    S(i, j) = |G_i ^ G_j| = sum_k |V_i[k] - V_j[k]|.

S_avg and S_max are the mean and the largest S(i, j) over the instants at which a rank i has ended a step (its
own gradient and those that had arrived are in x_i, and its next one begins), and over all other ranks j.
Beside them, as the concurrency and the delay of Koloskova et al. (2022; arXiv 2206.08307) for replicas:

- U_i = sum_k (V_k[k] - V_i[k]): gradients computed anywhere that x_i lacks, at the same instants;
- the spread of a gradient: steps of all ranks from its own until every replica has it.

Which pairs and instants the paper's own S_avg means, and its looser variants, was not verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.results import Results
from mpi_dasgd.storage.schema import APPLIED

__all__ = ["History", "SetStaleness", "history"]

_OWN, _ARRIVAL, _END = range(3)


class SetStaleness:
    """Meter of S and U.

    Args:
        versions: V of every rank, (ranks,) each; rows of it are read at each sample.

    Attributes:
        samples: number of instants.
        maximum: S_max so far.
        missing_maximum: largest U_i so far.
    """

    def __init__(self, versions: Sequence[np.ndarray] | np.ndarray) -> None:
        self._versions = versions
        self._sum = self._missing_sum = 0
        self.samples = self.maximum = self.missing_maximum = 0

    def update(self, rank: int) -> tuple[np.ndarray, int]:
        """Measure at the end of a step of `rank`; return S between it and each rank, and U of it."""
        table = np.asarray(self._versions)
        staleness = np.abs(table - table[rank]).sum(1)
        missing = int((table.max(0) - table[rank]).sum())  # nobody has more of k's than k
        self.samples += 1
        self._sum += int(staleness.sum())
        self._missing_sum += missing
        self.maximum = max(self.maximum, int(staleness.max()))
        self.missing_maximum = max(self.missing_maximum, missing)
        return staleness, missing

    @property
    def average(self) -> float:
        """S_avg so far; NaN before the first sample."""
        pairs = self.samples * (len(self._versions) - 1)
        return self._sum / pairs if pairs else float("nan")

    @property
    def missing_average(self) -> float:
        """Mean of U_i so far; NaN before the first sample."""
        return self._missing_sum / self.samples if self.samples else float("nan")


@dataclass(frozen=True)
class History:
    """The version vectors of a run, measured.

    Attributes:
        time: of each instant, (instants,), seconds since the start; ascending.
        rank: that has ended a step then, (instants,).
        mean, largest: of S between it and the other ranks, (instants,).
        missing: U of it, (instants,).
        spread: of each gradient, by source and order, (gradients,), in steps of all ranks; -1 if
            some replica never got it.
        average, maximum: S_avg and S_max.
    """

    time: np.ndarray
    rank: np.ndarray
    mean: np.ndarray
    largest: np.ndarray
    missing: np.ndarray
    spread: np.ndarray
    average: float
    maximum: int


def history(results: Results) -> History:
    """Rebuild the version vectors of all ranks from the results of a run of `dasgd`.

    Ranks without steps are left out, and those killed while others finished, whose records end too early.
    Clocks of ranks may differ a little: a gradient counts as computed no later than its first trace.

    Raises:
        UserError: no gradients of other ranks were recorded.
    """
    kept = _kept(results)
    ranks = results.rank[kept].tolist()
    arrivals = [_arrivals(results, row) for row in kept]
    if len(ranks) < 2 or not any(len(time) for time, *_ in arrivals):
        raise UserError(
            "results: expected the records of 'dasgd', found no gradient of another rank applied"
        )
    steps, ends = zip(*(_steps(results, row) for row in kept), strict=True)
    events = _events(ranks, arrivals, steps, ends)
    kind, time, rows, source, version = events
    table = np.zeros((len(ranks), int(results.attributes["ranks"])), np.int64)
    table[:, ranks] = [own[0] - 1 for own in steps]  # more than 0 if the run was resumed
    meter = SetStaleness(table)
    samples = []
    for k, i, j, v in zip(*(a.tolist() for a in (kind, rows, source, version)), strict=True):
        if k != _END:
            table[i, j] = max(v, table[i, j])
            continue
        staleness, missing = meter.update(i)
        samples.append((staleness.sum() / (len(ranks) - 1), staleness.max(), missing))
    mean, largest, lacking = np.array(samples).T
    return History(
        time=time[kind == _END],
        rank=np.array(ranks)[rows[kind == _END]],
        mean=mean,
        largest=largest.astype(np.int64),
        missing=lacking.astype(np.int64),
        spread=_spread(ranks, events, steps),
        average=meter.average,
        maximum=meter.maximum,
    )


def _kept(results: Results) -> np.ndarray:
    """Return the rows of the ranks whose records can be used."""
    kept = results.n_records["train"] > 0
    if results.attributes.get("status") == "degraded":
        kept &= results.rank_table["status"] != "killed"
    return np.flatnonzero(kept)


_Arrivals = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # time, own step, source, version


def _arrivals(results: Results, row: int) -> _Arrivals:
    """Return what the exchange table says of one rank, in order."""
    count, table = results.n_records["exchange"][row], results.tables["exchange"]
    applied = table["kind"][row, :count] == APPLIED
    time, step, source, version = (
        table[name][row, :count][applied] for name in ("time", "step", "partner", "partner_step")
    )
    return time, step, source, version


def _steps(results: Results, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the own steps of one rank, and when they ended."""
    count, table = results.n_records["train"][row], results.tables["train"]
    return table["step"][row, :count], table["time"][row, :count]


def _events(
    ranks: Sequence[int],
    arrivals: Sequence[_Arrivals],
    steps: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
) -> _Events:
    """Return kind, time, row, source and version of all that happened, in order of time."""
    parts = []
    for row, rank in enumerate(ranks):
        time, step, source, version = arrivals[row]
        own, end = steps[row], ends[row]
        # applied before its step ended, before what arrived in that step, before others had it
        bounds = [end, _at_first(step, time, own)]
        for other_time, _, other_source, other_version in arrivals:
            of_it = other_source == rank
            bounds.append(_at_first(other_version[of_it], other_time[of_it], own))
        when = np.minimum.accumulate(np.min(bounds, axis=0)[::-1])[::-1]
        parts += [
            _part(_OWN, when, row, rank, own),
            _part(_ARRIVAL, time, row, source, version),
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


def _at_first(ascending: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return for each of `wanted` the value where `ascending` first reaches it, infinity if never."""
    return np.append(values, np.inf)[np.searchsorted(ascending, wanted)]


def _spread(ranks: Sequence[int], events: _Events, steps: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each gradient how many steps of all ranks passed until every replica had it."""
    kind, _, row, source, version = events
    issued = np.cumsum(kind == _OWN)  # steps of all ranks so far
    spreads = []
    for k, rank in enumerate(ranks):
        own = issued[(kind == _OWN) & (row == k)]
        last = own.astype(float)
        for i in range(len(ranks)):
            got = (kind == _ARRIVAL) & (row == i) & (source == rank)
            if i != k:
                first = _at_first(np.maximum.accumulate(version[got]), issued[got], steps[k])
                last = np.maximum(last, first)
        spreads.append(np.where(np.isfinite(last), last - own, -1).astype(np.int64))
    return np.concatenate(spreads)
