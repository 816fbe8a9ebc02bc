"""What tests of benchmarks that start ranks share."""

from __future__ import annotations

import os

import pytest

from tests.support.mpi_ranks import ROOT, missing, mpi_library


@pytest.fixture
def rank_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks find this checkout and MPICH."""
    library = mpi_library("mpich")
    if library is None:
        missing("no library of MPICH: `make test` installs it")
    monkeypatch.setenv("MPI4PY_LIBMPI", str(library))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
