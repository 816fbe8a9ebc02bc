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

from mpi_dasgd.errors import PeerLost
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.storage.model import save_model
from mpi_dasgd.storage.results import consolidate, gather, results_path
from mpi_dasgd.storage.schema import CONSENSUS
from mpi_dasgd.storage.snapshots import Snapshot, Snapshots
from mpi_dasgd.training.evaluator import Evaluator

__all__ = ["RankRoles", "RunOutputs", "write_results"]


@dataclass(frozen=True)
class RankRoles:
    """Which ranks take which part in a run.

    Attributes:
        ranks: all ranks.
        model_ranks: ranks whose mean is the model that was trained.
        workers: ranks that compute gradients: their buffers, combined, are those of the model.
        dead: ranks that have died.
    """

    ranks: Sequence[int]
    model_ranks: Sequence[int]
    workers: Collection[int]
    dead: Collection[int] = ()


class RunOutputs:
    """Files that `write_results` leaves in a run directory, those of an earlier part apart.

    Args:
        directory: run directory; outputs that it has at construction do not count.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._earlier = self._identities()

    @property
    def complete(self) -> bool:
        """Whether results.h5 and model.h5 of this part of the run are there."""
        # A change of the folder makes a network file system notice another host's files.
        with tempfile.TemporaryFile(dir=self._directory):
            pass
        current = self._identities()
        return all(new and new != old for new, old in zip(current, self._earlier, strict=True))

    def _identities(self) -> list[tuple[int, int] | None]:
        return [_identity(results_path(self._directory)), _identity(_model_path(self._directory))]


def _model_path(directory: Path) -> Path:
    return directory / "model.h5"


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what distinguishes a file from a later one of the same name; None if there is none."""
    try:
        # Opened rather than listed: over NFS only that shows what another host has just written.
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def write_results(directory: Path, roles: RankRoles, milestones: int, evaluator: Evaluator) -> None:
    """Write results.h5 and model.h5, and remove the snapshots.

    Ranks that were lost before they had finished are left out; one that died later is not.

    Args:
        directory: run directory; all living ranks have closed their run file or are about to.
        roles: who is who.
        milestones: number of milestones.
        evaluator: evaluator of this rank; its model ends as the mean of all.

    Raises:
        PeerLost: no rank of `roles.model_ranks` has finished.
    """
    living = [rank for rank in roles.ranks if rank not in roles.dead]
    finished = _finished_ranks(directory, living, timeout=30.0)
    model_ranks = [rank for rank in roles.model_ranks if rank in finished]
    if not model_ranks:
        raise PeerLost(
            "model.h5 and the evaluation of the mean model are missing: ranks "
            f"{list(roles.model_ranks)} were lost before they left the trained model"
        )
    workers = [rank for rank in finished if rank in roles.workers] or model_ranks
    mean_model = _MeanModel(model_ranks, workers, evaluator.buffers)
    snapshots = Snapshots(directory / "snapshots")
    vector, buffers = mean_model.of(_load_snapshots(snapshots, milestones, finished))
    table = _ConsensusTable(mean_model, evaluator, _own_accuracies(directory))
    for milestone in range(1, milestones + 1):
        loaded = _load_snapshots(snapshots, milestone, finished)
        if len(loaded) == len(finished):
            table.add(milestone, loaded)
    consolidate(directory, table.columns())
    evaluator.set_weights(vector, buffers)
    save_model(_model_path(directory), evaluator.model.state_dict())
    snapshots.remove()


@dataclass(frozen=True)
class _MeanModel:
    """Ranks whose models make the mean model, and ranks whose buffers do: a server trains none."""

    model_ranks: Sequence[int]
    buffer_ranks: Sequence[int]
    buffers: ModelBuffers

    def of(self, snapshots: Mapping[int, Snapshot]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean model, 1-D float64, and its packed buffers, from all ranks' snapshots."""
        return (
            _mean([snapshots[rank].model for rank in self.model_ranks]),
            self.buffers.combine([snapshots[rank].buffers for rank in self.buffer_ranks]),
        )


def _load_snapshots(
    snapshots: Snapshots, milestone: int, ranks: Sequence[int]
) -> dict[int, Snapshot]:
    """Return the snapshots of `ranks` that exist."""
    loaded = {rank: snapshots.load(milestone, rank) for rank in ranks}
    return {rank: snapshot for rank, snapshot in loaded.items() if snapshot is not None}


def _mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(vectors, axis=0, dtype=np.float64))


def _finished_ranks(directory: Path, living: Sequence[int], timeout: float) -> list[int]:
    """Return the ranks that have finished, once `living` have closed their run file, or in time.

    Args:
        directory: run directory.
        living: ranks to wait for.
        timeout: seconds to wait at most.
    """
    deadline = time.monotonic() + timeout
    while True:
        results = gather(directory)
        statuses = results.rank_table["status"].tolist()
        status = dict(zip(results.rank.tolist(), statuses, strict=True))
        closed = all(status.get(rank, "running") != "running" for rank in living)
        if closed or time.monotonic() > deadline:
            return [rank for rank, word in status.items() if word == "finished"]
        time.sleep(0.05)


def _own_accuracies(directory: Path) -> dict[tuple[int, int], float]:
    """Return the test accuracies that ranks measured of their own models, by milestone and rank."""
    results = gather(directory)
    table = results.tables["evaluation"]
    return {
        (int(table["milestone"][row, record]), int(rank)): float(
            table["test_accuracy"][row, record]
        )
        for row, rank in enumerate(results.rank)
        for record in range(results.n_records["evaluation"][row])
    }


class _ConsensusTable:
    """Columns of `mpi_dasgd.storage.schema.CONSENSUS`, filled milestone by milestone.

    Args:
        mean_model: ranks that make the mean.
        evaluator: evaluates; its model is changed.
        known_accuracies: accuracies measured before, by milestone and rank.
    """

    def __init__(
        self,
        mean_model: _MeanModel,
        evaluator: Evaluator,
        known_accuracies: Mapping[tuple[int, int], float],
    ) -> None:
        self._mean_model = mean_model
        self._evaluator = evaluator
        self._known_accuracies = known_accuracies
        self._rows: list[dict[str, float]] = []

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns, one entry per milestone that was added."""
        return {
            column.name: np.array([row[column.name] for row in self._rows], np.float64)
            for column in CONSENSUS
        }

    def add(self, milestone: int, snapshots: Mapping[int, Snapshot]) -> None:
        """Evaluate the mean model, and each rank's, at `milestone`, from the snapshots of all."""
        models = snapshots.values()
        mean, buffers = self._mean_model.of(snapshots)
        distance = float(np.mean([np.square(s.model - mean).sum() for s in models]))
        accuracies = [
            self._accuracy(milestone, rank, snapshot) for rank, snapshot in snapshots.items()
        ]
        loss, accuracy = self._evaluator.evaluate(mean, buffers)
        row: dict[str, float] = {
            "milestone": milestone,
            "total_samples": max(s.total_samples for s in models),
            "samples": sum(s.samples for s in models),
            "time_s": max(s.time_s for s in models),
            "mean_test_loss": loss,
            "mean_test_accuracy": accuracy,
            "worst_test_accuracy": min(accuracies),
            "best_test_accuracy": max(accuracies),
            "consensus_distance": distance,
            "consensus_relative": distance / max(float(np.square(mean).sum()), 1e-300),
        }
        self._rows.append(row)

    def _accuracy(self, milestone: int, rank: int, snapshot: Snapshot) -> float:
        """Return the test accuracy of a rank's model, measured now if it was not before."""
        if (milestone, rank) in self._known_accuracies:
            return self._known_accuracies[milestone, rank]
        return self._evaluator.evaluate(snapshot.model, snapshot.buffers)[1]
