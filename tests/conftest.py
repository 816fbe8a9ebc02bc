"""What all tests share: the MPI libraries, fake hosts, and strictness in CI."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest

from mpi_dasgd.launch import mpiexec
from tests.support import mpi_ranks
from tests.support.fake_hosts import Hosts, isolated_hosts
from tests.support.mpi_ranks import CI, MPIS, mpi_library, rank_counts
from tests.support.rank_pool import close_pools

STARTS_RANKS = {"mpi", "n_ranks", "two_hosts"}  # fixtures

TOGETHER = {
    "test_cuda_compile.py": "compiled kernels",
    "test_native_build.py": "wheel",
    "test_job.py": "ranks",
    "test_world.py": "ranks",
    "test_docs.py": "site",
    "test_cuda_shim.py": "library",
    "test_cuda_average.py": "library",
    "test_program.py": "library",
    "test_scale.py": "library",
    "test_report.py": "runs",
    "test_results.py": "run",
    "test_quality.py": "table",
}
"""Files whose tests one process runs, by what they share; the longest first."""


@functools.cache
def _version(mpi: str) -> str:
    """Version text of an MPI library as mpi4py sees it; "" if it is not installed."""
    library = mpi_library(mpi)
    if library is None:
        return ""
    return mpiexec.mpi_library({**os.environ, "MPI4PY_LIBMPI": str(library)}).version


def pytest_configure(config: pytest.Config) -> None:
    """In CI every MPI must be there."""
    absent = [mpi for mpi in MPIS if mpi_library(mpi) is None]
    if CI and absent:
        raise pytest.UsageError(f"MPI libraries are missing: {absent}; `make test` installs them")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which MPI libraries the ranks will use."""
    lines = [f"{mpi}: {_version(mpi) or 'not installed, its tests are skipped'}" for mpi in MPIS]
    ranks = os.environ.get("MPI_DASGD_TEST_RANKS", "as each test says")
    return [*lines, f"ranks: {ranks}", f"CI: {CI} (missing pieces {'fail' if CI else 'skip'})"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start ranks; under xdist, what takes longest begins first."""
    for item in items:
        concurrent = item.get_closest_marker("concurrent") is not None
        if concurrent or STARTS_RANKS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.mpi)
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = list(TOGETHER)
        items.sort(
            key=lambda item: order.index(n) if (n := item.path.name) in order else len(order)
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``--dist loadscope``: deal the tests out one by one, but for those of `TOGETHER`.

    It is what ``--dist loadgroup`` is for, which does nothing with pytest 9.2 and xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(nodeid.partition("::")[0].rpartition("/")[2], nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside other tests only such ranks are started as bear it."""
    beside = "PYTEST_XDIST_WORKER" in os.environ
    mpi_ranks.may_start = not beside or item.get_closest_marker("concurrent") is not None


@pytest.fixture(params=MPIS)
def mpi(request: pytest.FixtureRequest) -> str:
    """Name of an MPI implementation; the test runs once with each."""
    name: str = request.param
    if mpi_library(name) is None:
        pytest.skip(f"{name} is not installed: `make test` installs it")
    return name


@pytest.fixture(params=rank_counts(2, 4))
def n_ranks(request: pytest.FixtureRequest) -> int:
    """Number of ranks: 2 and 4, or MPI_DASGD_TEST_RANKS."""
    number: int = request.param
    return number


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[Hosts]:
    """Two fake hosts without shared memory between them."""
    with isolated_hosts(2) as hosts:
        yield hosts


@pytest.fixture(scope="session", autouse=True)
def _no_ranks_stay_behind() -> Iterator[None]:
    """Ranks that wait for programs end with the tests."""
    yield
    close_pools()
