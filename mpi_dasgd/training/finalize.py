"""The end of a run: one rank evaluates the mean models and writes results.h5 and model.h5.

It works on the files that all ranks have left, so that it needs none of them any more.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpi_dasgd.errors import PeerLost
from mpi_dasgd.storage.model import save_model
from mpi_dasgd.storage.results import consolidate, gather, results_path
from mpi_dasgd.training.evaluator import Evaluator, Snapshots
from mpi_dasgd.training.flat_parameters import FlatParameters

__all__ = ["RunOutputs", "write_results"]


class RunOutputs:
    """What `conclude` leaves in the directory of a run, apart from what an earlier part of it has left.

    Args:
        directory: of the run; what it holds at construction does not count.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._earlier = self._found()

    @property
    def complete(self) -> bool:
        """Whether results.h5 and model.h5 of this part of the run are there."""
        # A network file system learns of another host's files at the latest when it changes the folder.
        with tempfile.TemporaryFile(dir=self._directory):
            pass
        return all(
            now and now != old for now, old in zip(self._found(), self._earlier, strict=True)
        )

    def _found(self) -> list[tuple[int, int] | None]:
        return [
            _identity(path) for path in (results_path(self._directory), _model(self._directory))
        ]


def _model(directory: Path) -> Path:
    return directory / "model.h5"


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from a later one of the same name; None if there is none."""
    try:
        # Opened, not looked for: over NFS only that shows what another host has just written.
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def write_results(
    directory: Path,
    ranks: Sequence[int],
    model_ranks: Sequence[int],
    points: int,
    model: torch.nn.Module,
    parameters: FlatParameters,
    evaluator: Evaluator,
    *,
    workers: Collection[int] | None = None,
    dead: Collection[int] = (),
) -> None:
    """Write results.h5 and model.h5, and remove the snapshots.

    Ranks that were lost before they had finished are left out; one that died later is not.

    Args:
        directory: of the run; the run files of `ranks` are closed or about to be, but for the dead.
        ranks: all.
        model_ranks: those whose mean is the model that was trained.
        points: number of milestones.
        model, parameters, evaluator: of this rank; the model ends as the mean of all.
        workers: ranks that computed gradients, which the model's buffers are of; None: all.
        dead: ranks that have died.

    Raises:
        PeerLost: no rank of `model_ranks` has finished.
    """
    alive = [rank for rank in ranks if rank not in dead]
    finished = _finished(directory, alive, timeout=30.0)
    chosen = [rank for rank in model_ranks if rank in finished]
    if not chosen:
        raise PeerLost(
            f"model.h5 and the evaluation of the mean model are missing: ranks {list(model_ranks)} were "
            "lost before they left the trained model"
        )
    trained = [rank for rank in finished if workers is None or rank in workers] or chosen
    mean = _MeanModel(chosen, trained)
    snapshots = Snapshots(directory / "snapshots")
    vector, buffers = mean.of(_loaded(snapshots, points, finished))
    known = _own_accuracies(directory)
    milestones = range(1, points + 1)
    table = _consensus_table(milestones, finished, mean, snapshots, evaluator, known)
    consolidate(directory, {name: np.asarray(column) for name, column in table.items()})
    parameters.set(vector)
    parameters.set_buffers(buffers)
    save_model(_model(directory), model.state_dict())
    snapshots.remove()


@dataclass(frozen=True)
class _MeanModel:
    """Which ranks' models make the mean model, and which ranks' buffers: a server trains none."""

    models: Sequence[int]
    buffers: Sequence[int]

    def of(
        self, snapshots: Mapping[int, Mapping[str, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean model and its buffers, flat, from the snapshots of all ranks."""
        return (
            _mean([snapshots[rank]["model"] for rank in self.models]),
            _mean([snapshots[rank]["buffers"] for rank in self.buffers]),
        )


def _loaded(
    snapshots: Snapshots, milestone: int, ranks: Sequence[int]
) -> dict[int, Mapping[str, np.ndarray]]:
    """Return the snapshots that there are of `ranks`."""
    found = {rank: snapshots.load(milestone, rank) for rank in ranks}
    return {rank: snapshot for rank, snapshot in found.items() if snapshot is not None}


def _mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(vectors, axis=0, dtype=np.float64))


def _finished(directory: Path, alive: Sequence[int], timeout: float) -> list[int]:
    """Return the ranks that have finished, when the run files of `alive` are closed, or after `timeout`."""
    deadline = time.monotonic() + timeout
    while True:
        results = gather(directory)
        status = dict(
            zip(results.rank.tolist(), results.rank_table["status"].tolist(), strict=True)
        )
        closed = all(status.get(rank, "running") != "running" for rank in alive)
        if closed or time.monotonic() > deadline:
            return [rank for rank, word in status.items() if word == "finished"]
        time.sleep(0.05)


def _own_accuracies(directory: Path) -> dict[tuple[int, int], float]:
    """Return what the ranks measured of their own models, by milestone and rank."""
    results = gather(directory)
    table = results.tables["evaluation"]
    return {
        (int(table["milestone"][row, record]), int(rank)): float(
            table["test_accuracy"][row, record]
        )
        for row, rank in enumerate(results.rank)
        for record in range(results.n_records["evaluation"][row])
    }


def _consensus_table(
    milestones: Sequence[int],
    ranks: Sequence[int],
    mean_model: _MeanModel,
    snapshots: Snapshots,
    evaluator: Evaluator,
    known: Mapping[tuple[int, int], float],
) -> dict[str, list[float]]:
    """Evaluate the mean model, and each rank's, at `milestones`.

    Args:
        milestones: those to evaluate; one that lacks a rank's snapshot is left out.
        ranks: whose models are looked at.
        mean_model: which of them make the mean.
        snapshots: where they are.
        evaluator: evaluates; its model is changed.
        known: accuracies measured before, by milestone and rank.

    Returns:
        Columns of `mpi_dasgd.storage.schema.CONSENSUS`, one entry a milestone.
    """
    table: dict[str, list[float]] = {
        name: []
        for name in (
            "milestone", "progress", "samples", "time", "mean_test_loss", "mean_test_accuracy",
            "worst_test_accuracy", "best_test_accuracy", "consensus_distance", "consensus_relative",
        )
    }  # fmt: skip
    for milestone in milestones:
        loaded = _loaded(snapshots, milestone, ranks)
        if len(loaded) < len(ranks):
            continue
        mean, buffers = mean_model.of(loaded)
        distance = float(np.mean([np.square(s["model"] - mean).sum() for s in loaded.values()]))
        accuracies = [
            known[milestone, rank]
            if (milestone, rank) in known
            else evaluator.evaluate(snapshot["model"], snapshot["buffers"])[1]
            for rank, snapshot in loaded.items()
        ]
        loss, accuracy = evaluator.evaluate(mean, buffers)
        when = np.array([snapshot["when"] for snapshot in loaded.values()])
        row = {
            "milestone": milestone,
            "progress": when[:, 2].max(),
            "samples": when[:, 1].sum(),
            "time": when[:, 0].max(),
            "mean_test_loss": loss,
            "mean_test_accuracy": accuracy,
            "worst_test_accuracy": min(accuracies),
            "best_test_accuracy": max(accuracies),
            "consensus_distance": distance,
            "consensus_relative": distance / max(float(np.square(mean).sum()), 1e-300),
        }
        for name, value in row.items():
            table[name].append(float(value))
    return table
