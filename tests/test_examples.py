"""The examples do what they claim; `own_loop.py` is run in `tests/launch/test_job.py`."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.test_report import write_tiny_run
from tests.support.mpi_ranks import ROOT, run_ranks
from tests.support.rank_pool import run_pooled

EXAMPLES = ROOT / "examples"


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_algorithm_is_short_and_converges_on_the_virtual_clock() -> None:
    assert len((EXAMPLES / "own_algorithm.py").read_text().splitlines()) < 60
    figures = ast.literal_eval(_run("own_algorithm.py"))
    assert figures["algorithm"] == "clipped_gossip"
    assert figures["waits"] == 0
    assert figures["final_distance"] < 1e-4
    # As that of `adpsgd` with variant `pull`, whose averages it makes where none is clipped.
    assert 1.2 < figures["effective_step"] < 1.4


@pytest.mark.mpi
def test_own_algorithm_converges_on_ranks() -> None:
    done = run_ranks(2, EXAMPLES / "own_algorithm.py", "ranks")
    # Ranks print at the same time: a line may begin where another has not ended.
    errors = re.findall(r"error (\d\.\de[-+]\d\d)", done.stdout)
    assert len(errors) == 2
    assert max(map(float, errors)) < 1e-3


@pytest.mark.mpi
def test_attached_loop_learns_on_shards_of_the_data() -> None:
    printed = run_pooled(2, EXAMPLES / "attached_loop.py").stdout
    match = re.fullmatch(r"2 ranks, (\d+) samples, accuracy ([\d.]+) %\n", printed)
    assert match is not None
    assert int(match[1]) == 2 * 20 * 24 * 32  # 24 batches of 32 in each half of the data
    assert float(match[2]) > 90


def test_reading_results_gives_the_figures_of_the_run(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    printed = _run("read_results.py", str(tmp_path)).splitlines()
    assert printed[0].endswith(": swarm, 2 ranks, finished")
    # Of the ages -2, 5, 3, 4; 5,400 bytes in the 3 exchanges that a rank began or applied.
    assert printed[1] == "staleness: 3.00 steps in the mean, 5 at most"
    assert printed[2] == "bytes per exchange: 1800"
    assert printed[3] == "MB moved by each rank: 0.004 0.001"
    assert printed[4] == "mean over ranks of ||x_i - mean||^2: 2.0 0.5"


@pytest.mark.mpi
@pytest.mark.parametrize("framework", ["huggingface", "lightning"])
def test_trainer_of_a_framework_learns_on_ranks(framework: str) -> None:
    printed = run_pooled(2, EXAMPLES / f"{framework}_trainer.py").stdout
    (accuracy,) = re.findall(r"^2 ranks, accuracy ([\d.]+) %$", printed, re.M)
    assert float(accuracy) > 80
