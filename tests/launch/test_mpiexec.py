"""Choice of the launcher that belongs to the MPI library, and the environment of the ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.launch import mpiexec
from tests.support.mpi_ranks import mpi_library

pytestmark = pytest.mark.concurrent


@pytest.fixture(scope="module")
def mpich() -> mpiexec.Library:
    return mpiexec.mpi_library({**os.environ, "MPI4PY_LIBMPI": str(mpi_library("mpich"))})


def test_threads_share_the_cores(monkeypatch, mpich):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MPI4PY_LIBMPI", mpich.path)

    def threads(n: int, **options: str) -> str:
        return mpiexec.plan_launch(n, **options).environment["OMP_NUM_THREADS"]

    assert threads(4) == "3"
    assert threads(16) == "1"
    assert threads(8, hosts="a:4,b:4") == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads(4) == "7"


def test_launcher_belongs_to_the_library(mpi):
    library = mpiexec.mpi_library({**os.environ, "MPI4PY_LIBMPI": str(mpi_library(mpi))})
    launcher = Path(mpiexec.find_launcher(library))
    assert library.family.extra == mpi
    assert launcher.parent == Path(library.path).parent.parent / "bin"


def test_launcher_of_another_mpi_is_refused(mpi, mpich, monkeypatch, tmp_path):
    if mpi == "mpich":
        other = mpiexec.Library("Open MPI v5.0.11", "")
        launcher = mpiexec.find_launcher(mpich)
    else:
        other = mpich
        launcher = str(mpi_library(mpi).parent.parent / "bin" / "mpirun")
    with pytest.raises(UserError, match="does not belong to"):
        mpiexec.find_launcher(other, launcher)
    # It is not taken from PATH, either.
    monkeypatch.setenv("PATH", str(Path(launcher).parent))
    with pytest.raises(UserError, match=rf"mpi_dasgd\[{other.family.extra}\]"):
        mpiexec.find_launcher(mpiexec.Library(other.version, str(tmp_path / "lib/libmpi.so")))


def test_launcher_is_found_in_path(mpich, monkeypatch):
    directory = Path(mpiexec.find_launcher(mpich)).parent
    monkeypatch.setenv("PATH", f"/nowhere:{directory}")
    elsewhere = mpiexec.Library(mpich.version, "/nowhere/lib/libmpi.so.12")
    assert mpiexec.find_launcher(elsewhere) == str(directory / "mpiexec")


def test_unknown_library_is_refused():
    with pytest.raises(UserError, match=r"Intel.*srun"):
        _ = mpiexec.Library("Intel(R) MPI Library 2021.12", "/opt/lib/libmpi.so.12").family
