"""Construction that a rank does not come to: the others end, under any launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpi_dasgd.launch import mpiexec
from tests.support.mpi_ranks import ROOT, mpi_library
from tests.test_process_end import launch_script

pytestmark = pytest.mark.concurrent

SCRIPT = """
import os, sys
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1: sys.exit(0)  # it waits for the others in the end of MPI
import torch, mpi_dasgd
from mpi_dasgd.training import construction
construction._LEAST_SECONDS = 0.0
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mpi_dasgd.Decentralized(model, optimizer, config={"transport.stall_timeout": 1.5})
"""
MESSAGE = "rank 0 has waited in mpi_dasgd.Decentralized(...) for other ranks for 1.5 s; every rank"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_a_rank_that_never_imports_the_package_is_waited_for_as_long_as_allowed(
    script: Path,
) -> None:
    job = launch_script(script, 2)
    assert job.code == 2, job.err
    assert job.err.count(MESSAGE) == job.err.count("mpi-dasgd: ") == 1
    assert job.seconds < 60


def test_so_it_is_under_the_launcher_of_the_library(mpi: str, script: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPI4PY_LIBMPI": str(mpi_library(mpi))}
    library = mpiexec.mpi_library(environment)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    oversubscribe = ["--oversubscribe"] if mpi == "openmpi" else []
    job = subprocess.run(
        [mpiexec.find_launcher(library), *oversubscribe, "-n", "2", sys.executable, str(script)],
        env={**environment, **root, "OMP_NUM_THREADS": "1", "OMPI_MCA_osc": "^ucx"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert job.returncode == 2, job.stderr
    assert job.stderr.count(MESSAGE) == 1
