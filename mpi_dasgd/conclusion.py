"""The end of a run: one rank evaluates the mean models and writes results.h5 and model.h5.

It works on the files that all ranks have left, so that it needs none of them any more.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mpi_dasgd.evaluation import Evaluator, Snapshots
from mpi_dasgd.parameters import FlatParameters
from mpi_dasgd.storage.model import save_model
from mpi_dasgd.storage.results import consolidate, gather

__all__ = ["conclude"]


def conclude(
    directory: Path,
    ranks: Sequence[int],
    model_ranks: Sequence[int],
    points: int,
    model: torch.nn.Module,
    parameters: FlatParameters,
    evaluator: Evaluator,
) -> None:
    """Write results.h5 and model.h5, and remove the snapshots.

    Args:
        directory: of the run; the run files of `ranks` are closed or about to be.
        ranks: those that finished.
        model_ranks: those of them whose mean is the model that was trained.
        points: number of milestones.
        model, parameters, evaluator: of this rank; the model ends as the mean of all.
    """
    _wait_until_closed(directory, ranks, timeout=30.0)
    snapshots = Snapshots(directory / "snapshots")
    known = _own_accuracies(directory)
    table = _consensus_table(range(1, points + 1), ranks, model_ranks, snapshots, evaluator, known)
    consolidate(directory, {name: np.asarray(column) for name, column in table.items()})
    last = [snapshots.load(points, rank) for rank in model_ranks]
    found = [snapshot for snapshot in last if snapshot is not None]
    parameters.set(_mean([snapshot["model"] for snapshot in found]))
    parameters.set_buffers(_mean([snapshot["buffers"] for snapshot in found]))
    save_model(directory / "model.h5", model.state_dict())
    snapshots.remove()


def _mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(vectors, axis=0, dtype=np.float64))


def _wait_until_closed(directory: Path, ranks: Sequence[int], timeout: float) -> None:
    """Wait until the run files of `ranks` are closed, or `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        results = gather(directory)
        status = dict(zip(results.rank.tolist(), results.ranks["status"].tolist(), strict=True))
        if all(status.get(rank, "running") != "running" for rank in ranks):
            return
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
        for record in range(results.records["evaluation"][row])
    }


def _consensus_table(
    milestones: Sequence[int],
    ranks: Sequence[int],
    model_ranks: Sequence[int],
    snapshots: Snapshots,
    evaluator: Evaluator,
    known: Mapping[tuple[int, int], float],
) -> dict[str, list[float]]:
    """Evaluate the mean model, and each rank's, at `milestones`.

    Args:
        milestones: those to evaluate; one that lacks a rank's snapshot is left out.
        ranks: whose models are looked at.
        model_ranks: those of them whose models make the mean.
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
        found = [snapshots.load(milestone, rank) for rank in ranks]
        loaded = [snapshot for snapshot in found if snapshot is not None]
        if len(loaded) < len(found) or not loaded:
            continue
        models = [snapshot["model"] for snapshot in loaded]
        chosen = [s for rank, s in zip(ranks, loaded, strict=True) if rank in model_ranks]
        mean = _mean([snapshot["model"] for snapshot in chosen])
        buffers = _mean([snapshot["buffers"] for snapshot in chosen])
        distance = float(np.mean([np.square(model - mean).sum() for model in models]))
        accuracies = [
            known[milestone, rank]
            if (milestone, rank) in known
            else evaluator.of(snapshot["model"], snapshot["buffers"])[1]
            for rank, snapshot in zip(ranks, loaded, strict=True)
        ]
        loss, accuracy = evaluator.of(mean, buffers)
        when = np.array([snapshot["when"] for snapshot in loaded])
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
