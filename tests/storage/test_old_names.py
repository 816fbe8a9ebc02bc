"""Results of earlier versions: columns that were renamed are read under their names of today."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest

from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.storage.results import consolidate, results_path
from mpi_dasgd.storage.runfile import RunFile, rank_path
from mpi_dasgd.storage.schema import TrainRow

OLD = {"delay_mean": 3.0, "delay_average": 4.0, "delay_max": 7}
"""Counters of a server under their old names."""


@pytest.mark.parametrize("whole", [True, False], ids=["results.h5", "run files"])
def test_delays_of_the_server_have_the_names_of_today(tmp_path: Path, whole: bool) -> None:
    file = RunFile(rank_path(tmp_path, 0), rank=0, size=1, attributes={"algorithm": "asgd"})
    file.append(
        TrainRow(
            step=1,
            time_s=1.5,
            samples=100,
            total_samples=100,
            loss=0.5,
            learning_rate=0.1,
            compute_s=1,
            exchange_s=0.4,
            wait_s=0.1,
            delay=0,
            delay_factor=1.0,
        )
    )
    file.close("finished", OLD)
    if whole:
        consolidate(tmp_path, None)
        with h5py.File(results_path(tmp_path), "r+") as results:
            for name in OLD:
                results["ranks"].move(f"server_{name}", name)
    table = load_run(tmp_path).results.rank_table
    assert {name: table[f"server_{name}"][0] for name in OLD} == OLD
    assert not table.keys() & OLD
