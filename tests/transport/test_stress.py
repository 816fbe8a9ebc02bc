"""The transport under stress by real processes: on one host, in place and not, and between hosts.

MPI_DASGD_TEST_STRESS=100000 makes as many publications and messages between hosts, too (minutes).
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mpi_dasgd.kernels import native
from tests.programs.faults import FAULTS
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import ROOT, missing, rank_counts, run_ranks

PROGRAMS = ROOT / "tests" / "programs"
BETWEEN_HOSTS = int(os.environ.get("MPI_DASGD_TEST_STRESS", 0))
LIMIT = max(150, BETWEEN_HOSTS // 150)  # seconds: a few ms per operation


def report_of(n: int, program: str, *args: str, **options: Any) -> Any:
    """Run a program on `n` ranks and return what rank 0 reports."""
    return json.loads(run_ranks(n, PROGRAMS / program, *args, **options).stdout)


def assert_clean(report: Any, publications: int, messages: int) -> None:
    """Nothing torn, lost, twice, or out of order, and enough of everything done."""
    assert report["found"] == {}
    done = report["done"]
    assert done["published"] >= publications
    assert done["sent"] == done["received"] >= messages
    assert done["claimed"] > messages / 50 and done["read"] > messages / 10
    assert done["cancelled"] > messages / 50


@pytest.mark.parametrize(
    ("default", "path", "words", "count"),
    [
        (4, "auto", "node", 50_000),
        (4, "auto", "native", 100_000),
        (3, "auto", "window", 30_000),
        (2, "rma", "window", 30_000),
    ],
)
def test_one_host(mpi: str, default: int, path: str, words: str, count: int) -> None:
    if words != "window" and native.load() is None:
        missing(f"native library: {native.status()}")
    (n,) = rank_counts(default)
    count = count if mpi == "mpich" else min(count, 30_000)
    args = f"--path {path} --words {words} --publications {count} --messages {count} --sleep 2"
    report = report_of(n, "stress.py", *args.split(), mpi=mpi, timeout=200)
    assert_clean(report, count, count)
    assert report["path"] == {"auto": "in place", "rma": "Get and Put"}[path]
    assert report["words"] == ("WindowWords" if words == "window" else "NodeWords")
    assert report["protocol"] == ("NativePublication" if words == "native" else "Publication")
    assert report["inbox_full"] > 100 and report["skipped"] > 10, "no inbox or publication was full"
    assert report["touched"] > 100, "a rank outside MPI blocked the others"
    assert report["longest"] < 1.5


@pytest.mark.parametrize("path", ["auto", "rma"])
def test_pairs_on_one_host(mpi: str, path: str) -> None:
    """The same through `RmaEndpoint`, its progress thread and its end without a barrier."""
    (n,) = rank_counts(3)
    args = ["--path", path, "--exchanges", "10000", "--sleep", "1"]
    report = report_of(n, "pairs.py", *args, mpi=mpi, timeout=200)
    assert_pairs(report, 10_000)
    assert report["touched"] > 20


def assert_pairs(report: Any, exchanges: int) -> None:
    assert report["found"] == {}
    done, counters = report["done"], report["counters"]
    assert done["sent"] == done["received"] >= exchanges
    assert done["aborted"] > exchanges / 20
    assert done["claimed"] == done["sent"] + done["aborted"]
    counts = {"messages": "sent", "absorbed": "received", "publications": "published"}
    for name, count in counts.items():
        assert counters[name] == done[count]


@pytest.mark.timeout(LIMIT + 120)
def test_between_hosts(mpi: str, two_hosts: Hosts, tmp_path: Path) -> None:
    # With two ranks per host, Open MPI makes operations over TCP wait for seconds (not our fault).
    n = 4 if mpi == "mpich" else 2
    count = BETWEEN_HOSTS or 10_000
    args = f"--publications {count} --messages {count} --sleep 1 --limit {LIMIT}".split()
    args += ["--until-read", str(tmp_path)]
    report = report_of(n, "stress.py", *args, mpi=mpi, hosts=two_hosts, timeout=LIMIT + 60)
    assert_clean(report, count, count)
    assert report["path"] == "in place within a node, Get and Put between nodes"
    assert report["touched"] > 0, "a rank outside MPI blocked the others"


def test_pairs_between_hosts(mpi: str, two_hosts: Hosts, tmp_path: Path) -> None:
    n, count = {"mpich": (4, 1000), "openmpi": (2, 150)}[mpi]
    args = ["--exchanges", str(count), "--sleep", "1", "--until-read", str(tmp_path)]
    report = report_of(n, "pairs.py", *args, mpi=mpi, hosts=two_hosts, timeout=200)
    assert_pairs(report, count)
    assert report["touched"] > 0


@functools.cache
def fault_reports(mpi: str) -> Any:
    """Reports of the stress for each faulty protocol."""
    args = ["--publications", "1000", "--messages", "1000", "--pause", "0.05", "--limit", "10"]
    names = [part for name in FAULTS for part in ("--fault", name)]
    return report_of(2, "stress.py", *args, *names, mpi=mpi, timeout=200)


@pytest.mark.parametrize("fault", FAULTS)
def test_stress_finds_each_fault(mpi: str, fault: str) -> None:
    """The tests above can fail."""
    found = fault_reports(mpi)[fault]["found"]
    assert any(found.get(sign, 0) for sign in FAULTS[fault].signs), found


@pytest.mark.parametrize("cases", ["sizes pieces closed silent", "endpoint"])
def test_windows(mpi: str, cases: str) -> None:
    run_ranks(2, PROGRAMS / "windows.py", *cases.split(), mpi=mpi)


def test_no_swap_is_lost_between_hosts(mpi: str, two_hosts: Hosts) -> None:
    run_ranks(2, PROGRAMS / "windows.py", "contended", mpi=mpi, hosts=two_hosts)


def test_shared_memory_mode_needs_one_host(two_hosts: Hosts) -> None:
    run_ranks(2, PROGRAMS / "windows.py", "shared_memory", hosts=two_hosts)
