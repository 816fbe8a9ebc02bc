"""Run with the figures of its report, each of them measured or None."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpi_dasgd.storage.json_values import json_value
from mpi_dasgd.storage.results import Results
from mpi_dasgd.storage.schema import APPLIED, CONSENSUS, INITIATED, SKIPPED, UNKNOWN_AGE

__all__ = ["Evaluations", "Run", "SecondsTo"]

# Shown by the summary and the list of ranks; the other attributes are provenance.
IDENTITY = (
    "config_json",
    "algorithm",
    "codec",
    "world_size",
    "seed",
    "task",
    "status",
    "topology",
    "name",
)


class SecondsTo(NamedTuple):
    """Wall seconds after which an accuracy was first measured; None if it never was."""

    mean: float | None
    worst: float | None


class Evaluations(NamedTuple):
    """Accuracies over milestones, (milestone,) each, NaN where not measured.

    `mean` is of the mean of all models, `worst` and `best` are over the models of the ranks.
    """

    samples: np.ndarray
    seconds: np.ndarray
    mean: np.ndarray
    worst: np.ndarray
    best: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run and its figures.

    Attributes:
        name: name of the run in tables and figures.
        path: run directory.
        results: records of all ranks.
    """

    name: str
    path: Path
    results: Results

    @property
    def config(self) -> dict[str, Any]:
        """The configuration; empty if it was not recorded."""
        config = json.loads(self.results.attributes.get("config_json", "{}"))
        return config if isinstance(config, dict) else {}

    @property
    def provenance(self) -> dict[str, str]:
        """Versions, machine, source and command of the run."""
        return {k: str(v) for k, v in self.results.attributes.items() if k not in IDENTITY}

    def column(self, table: str, name: str) -> np.ndarray:
        """Return the valid values of a column, rank after rank, (records of all ranks,)."""
        values = self.results.tables[table][name]
        records = self.results.n_records[table]
        return np.concatenate([row[:n] for row, n in zip(values, records, strict=True)])

    def ages(self) -> np.ndarray:
        """Return by how many steps each received state lagged behind its reader (< 0: ahead)."""
        ages = self.column("exchange", "age_steps")
        known = (self.column("exchange", "kind") != SKIPPED) & (ages != UNKNOWN_AGE)
        return np.asarray(ages[known])

    def delays(self) -> np.ndarray:
        """Return the delay of each gradient, in gradients of other ranks; empty if all are 0."""
        delays = self.column("train", "delay")
        return delays if delays.any() else np.empty(0, delays.dtype)

    def evaluations(self) -> Evaluations:
        """Return the accuracies at the milestones.

        Without the consensus table, as in a live run, worst and best come from the ranks' own
        evaluations, at the milestones that all ranks have reached; the mean model is unknown then.
        """
        consensus = self.results.consensus
        if not consensus:
            return self._own_evaluations()
        unknown = np.full(len(consensus["milestone"]), np.nan)
        names = (
            "total_samples",
            "time_s",
            "mean_test_accuracy",
            "worst_test_accuracy",
            "best_test_accuracy",
        )
        return Evaluations(*(consensus.get(name, unknown).astype(float) for name in names))

    def _own_evaluations(self) -> Evaluations:
        milestones = self.column("evaluation", "milestone")
        columns = {
            name: self.column("evaluation", name).astype(float)
            for name in ("total_samples", "time_s", "test_accuracy")
        }
        size = len(self.results.rank)
        common = [m for m in np.unique(milestones) if (milestones == m).sum() == size]
        at = [milestones == milestone for milestone in common]
        accuracy = [columns["test_accuracy"][where] for where in at]
        return Evaluations(
            samples=np.array([columns["total_samples"][where].max() for where in at]),
            seconds=np.array([columns["time_s"][where].max() for where in at]),
            mean=np.full(len(at), np.nan),
            worst=np.array([values.min() for values in accuracy]),
            best=np.array([values.max() for values in accuracy]),
        )

    def seconds_to(self, accuracy: float) -> SecondsTo:
        """Return when `accuracy` (a fraction) was first measured, of mean model and worst rank."""
        curves = self.evaluations()

        def first(values: np.ndarray) -> float | None:
            reached = np.flatnonzero(values >= accuracy)
            return json_value(curves.seconds[reached[0]]) if len(reached) else None

        return SecondsTo(first(curves.mean), first(curves.worst))

    def summary(self) -> dict[str, Any]:
        """Return the figures of the run, as JSON can hold them; None for what was not measured.

        `staleness_mean` and `staleness_max` count a state that was ahead of its reader as 0 steps
        stale. `exchanges` counts averages initiated and gradients of others applied;
        `bytes_per_exchange` is all payload moved, divided by them. `delay_factor_mean` is the mean
        factor of the delay-adaptive rule, None where it changed nothing. Accuracies, test loss and
        consensus distance are those of the last milestone.
        """
        attributes, ranks = self.results.attributes, self.results.rank_table
        stale = np.maximum(self.ages(), 0)
        delays, factors = self.delays(), self.column("train", "delay_factor")
        exchanges = int(np.isin(self.column("exchange", "kind"), (INITIATED, APPLIED)).sum())
        wall = float(ranks["wall_s"].max())
        samples = int(ranks["samples"].sum())
        accuracy = self.evaluations()
        return {
            "name": self.name,
            "algorithm": attributes.get("algorithm"),
            "codec": attributes.get("codec"),
            "topology": attributes.get("topology") or self._configured("topology"),
            "task": attributes.get("task"),
            "seed": attributes.get("seed"),
            "status": attributes["status"],
            "ranks": int(attributes["world_size"]),
            "ranks_lost": sorted(self.results.lost),
            "samples": samples,
            "wall_s": wall,
            "samples_per_s": json_value(samples / wall) if wall > 0 else None,
            "train_loss": self._final_loss(),
            "test_loss": self._last("mean_test_loss"),
            "test_accuracy": _last(accuracy.mean),
            "worst_rank_accuracy": _last(accuracy.worst),
            "staleness_mean": float(stale.mean()) if len(stale) else None,
            "staleness_max": int(stale.max()) if len(stale) else None,
            "delay_mean": float(delays.mean()) if len(delays) else None,
            "delay_max": int(delays.max()) if len(delays) else None,
            "delay_factor_mean": float(factors.mean()) if (factors != 1.0).any() else None,
            "exchanges": exchanges or None,
            "bytes_per_exchange": self._bytes() / exchanges if exchanges else None,
            "bytes_sent": self._counter("bytes_sent"),
            "consensus_distance": self._last("consensus_distance"),
            "consensus_relative": self._last("consensus_relative"),
        }

    def report(self) -> dict[str, Any]:
        """Return the summary, one entry per rank, the milestones, configuration and provenance."""
        ranks = [
            {"rank": int(rank)}
            | {name: json_value(values[row]) for name, values in self.results.rank_table.items()}
            for row, rank in enumerate(self.results.rank)
        ]
        milestones = {
            column.name: [json_value(value) for value in self.results.consensus[column.name]]
            for column in CONSENSUS
            if column.name in self.results.consensus
        }
        return self.summary() | {
            "path": str(self.path.resolve()),
            "per_rank": ranks,
            "milestones": milestones,
            "config": self.config,
            "provenance": self.provenance,
        }

    def _bytes(self) -> float:
        return float(self.column("exchange", "bytes").sum())

    def _configured(self, name: str) -> str | None:
        value = self.config.get(name)
        return value if isinstance(value, str) else None

    def _counter(self, name: str) -> int | None:
        values = self.results.rank_table.get(name)
        return None if values is None or (values < 0).any() else int(values.sum())

    def _final_loss(self) -> float | None:
        """Return the mean training loss of the last twentieth of the samples."""
        samples, loss = self.column("train", "total_samples"), self.column("train", "loss")
        return json_value(loss[samples >= 0.95 * samples.max()].mean())

    def _last(self, name: str) -> float | None:
        return _last(self.results.consensus.get(name, np.empty(0)))


def _last(values: np.ndarray) -> float | None:
    return json_value(values[-1]) if len(values) else None
