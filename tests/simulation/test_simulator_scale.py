"""Simulations of thousands of ranks: what they cost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.mpi_ranks import ROOT

pytestmark = pytest.mark.slow

PROGRAM = """
import json, resource, sys
from mpi_dasgd.config import load
from mpi_dasgd.simulation.simulator import simulate

before = resource.getrusage(resource.RUSAGE_SELF)
metrics = simulate(load(sys.argv[1], sys.argv[2:]))
after = resource.getrusage(resource.RUSAGE_SELF)
metrics["processor_seconds"] = after.ru_utime - before.ru_utime
metrics["megabytes"] = (after.ru_maxrss - before.ru_maxrss) / 1024  # Linux counts in KiB
print(json.dumps(metrics))
"""


def run(*overrides: str) -> Any:
    """Run jobs/sim_scale.toml in a process of its own, whose memory is its alone."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "jobs" / "sim_scale.toml"), *overrides],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return json.loads(done.stdout)


def test_4096_ranks_of_1000_dimensions() -> None:
    """Memory is 10 models per rank and some objects; neither it nor time grows with n^2."""
    ranks, dimension, gradients = 4096, 1000, 10_000
    # The complete graph too: as lists its neighbours alone would be 670 MB.
    metrics = run(f"budget.samples={gradients}", "topology.graph=complete")
    assert (metrics["ranks"], metrics["gradients"]) == (ranks, gradients)
    assert metrics["events"] > 4 * gradients
    assert metrics["megabytes"] < 12 * 8 * ranks * dimension / 2**20 + ranks * 0.03
    # A quarter of a millisecond an event would be a million in five minutes.
    assert metrics["processor_seconds"] < 0.0003 * metrics["events"] + 5
    assert abs(metrics["effective_step"] - 1) < 0.03
    assert metrics["conservation_error"] < 1e-12
