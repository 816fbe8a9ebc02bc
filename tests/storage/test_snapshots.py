"""Snapshots: copies, on disk, of models that change on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpi_dasgd.storage.snapshots import Snapshot, Snapshots
from mpi_dasgd.storage.writer_thread import writer


def test_a_snapshot_is_a_copy_and_comes_back_as_it_was(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    model, buffers = np.arange(4, dtype=np.float32), np.array([2.5])
    snapshots.save(2, 1, Snapshot(model, buffers, 1.5, 10, 40))
    model += 1
    buffers += 1
    writer().submit(lambda: None).result()
    loaded = snapshots.load(2, 1)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.model, np.arange(4, dtype=np.float32), strict=True)
    np.testing.assert_array_equal(loaded.buffers, [2.5])
    assert loaded[2:] == (1.5, 10, 40)


def test_what_was_not_saved_or_was_removed_is_none(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    snapshots.save(2, 1, Snapshot(np.zeros(4), np.zeros(0), 1.5, 10, 40))
    writer().submit(lambda: None).result()
    assert snapshots.load(2, 0) is None
    assert snapshots.load(1, 1) is None
    snapshots.remove()
    assert snapshots.load(2, 1) is None
    assert list(tmp_path.iterdir()) == []
