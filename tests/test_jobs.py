"""The jobs of every algorithm do what they say: four ranks on real windows learn the digits."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import ROOT, run_ranks

from mpi_dasgd import algorithms, config
from mpi_dasgd.analysis.load import load_run

JOBS = sorted((ROOT / "jobs" / "digits").glob("*.toml"))
PROGRAM = ROOT / "tests" / "transport" / "jobs.py"


def test_every_algorithm_has_a_job() -> None:
    names = {config.load(job).algorithm.name for job in JOBS}
    assert names == set(algorithms.ALGORITHMS) - {"alone"}
    assert [job.stem for job in JOBS] == [config.load(job).algorithm.name for job in JOBS]


@pytest.mark.mpi
def test_every_algorithm_learns_the_digits(tmp_path: Path) -> None:
    run_ranks(4, PROGRAM, str(tmp_path), *map(str, JOBS), timeout=500)
    accuracy = {}
    for job in JOBS:
        run = load_run(tmp_path / config.load(job).run.name)
        assert run.results.attributes["status"] == "finished", job.name
        accuracy[job.stem] = float(run.evaluations().mean[-1])
    assert min(accuracy.values()) >= 0.96, accuracy
