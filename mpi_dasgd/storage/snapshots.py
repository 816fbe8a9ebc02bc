"""Models of all ranks at the milestones of a run, as files, until the mean model is evaluated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpi_dasgd.storage.writer_thread import writer

__all__ = ["Snapshot", "Snapshots"]


class Snapshot(NamedTuple):
    """Model of one rank at a milestone.

    Attributes:
        model: parameters, (elements,), float32 or float64.
        buffers: buffers of the module, packed: (bytes,), uint8; of older files (buffer elements,),
            float64.
        time_s: seconds since training began.
        samples: samples that the rank has processed.
        total_samples: samples that all ranks have processed, as the rank has seen.
    """

    model: np.ndarray
    buffers: np.ndarray
    time_s: float
    samples: int
    total_samples: int


class Snapshots:
    """Snapshots of all ranks at the milestones, as files of one directory.

    Args:
        directory: directory of the run's snapshots.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, milestone: int, rank: int) -> Path:
        return self._directory / f"m{milestone:05d}-r{rank:05d}.npz"

    def save(self, milestone: int, rank: int, snapshot: Snapshot) -> None:
        """Copy a snapshot and write it in the background."""
        path = self._path(milestone, rank)
        model, buffers = snapshot.model.copy(), snapshot.buffers.copy()
        when = np.array([snapshot.time_s, snapshot.samples, snapshot.total_samples], np.float64)

        def write() -> None:
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, allow_pickle=False, model=model, buffers=buffers, when=when)
            os.replace(temporary, path)  # noqa: PTH105

        writer().submit(write)

    def load(self, milestone: int, rank: int) -> Snapshot | None:
        """Return the snapshot of `rank` at `milestone`, or None if there is none."""
        path = self._path(milestone, rank)
        if not path.exists():
            return None
        with np.load(path) as file:
            time_s, samples, total_samples = file["when"].tolist()
            return Snapshot(
                file["model"], file["buffers"], time_s, int(samples), int(total_samples)
            )

    def remove(self) -> None:
        """Delete the directory with all snapshots."""
        shutil.rmtree(self._directory, ignore_errors=True)
