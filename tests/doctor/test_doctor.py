"""The doctor: findings here, under a launcher and between hosts, and its advice on problems."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from mpi_dasgd import doctor
from mpi_dasgd.device import binding
from mpi_dasgd.doctor import environment, probe
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import ROOT, mpi_library, run_ranks

PROGRAM = """
import sys
from mpi_dasgd.cli import main
sys.exit(main(["doctor", "--json"]))
"""


def examine(directory: Path, library: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``mpi-dasgd doctor`` alone, with a given MPI library."""
    return subprocess.run(
        [sys.executable, "-m", "mpi_dasgd", "doctor", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPI4PY_LIBMPI": library},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def findings(text: str) -> dict[str, dict[str, Any]]:
    """Return the checks by name, after asserting that none of them fails."""
    report = json.loads(text)
    checks = {check["name"]: check for check in report["checks"]}
    assert len(checks) == len(report["checks"])
    assert all(check["verdict"] in ("ok", "warning") for check in checks.values()), text
    assert report["ok"] is True
    return checks


class OneRank:
    """The ranks of a job, of which one asks the others, and knows what they say."""

    def __init__(self, *told: binding.RankGpu) -> None:
        self.told = told
        self.comm = self
        self.collective_errors = contextlib.nullcontext

    def allgather(self, own: binding.RankGpu) -> list[binding.RankGpu]:
        """What the ranks told."""
        assert isinstance(own, binding.RankGpu)
        return list(self.told)


@pytest.mark.parametrize(
    ("identities", "settings", "verdict", "text"),
    [
        (["a", "b"], ["0,1", "0,1"], "ok", "each rank has its own: cuda:0, cuda:0"),
        (["a", "a"], ["0", "0"], "warning", "ranks 0 and 1 have their models on one GPU"),
        (["a", "b"], ["0", "0"], "warning", "ranks see a GPU each, and not those of the others"),
    ],
)
def test_gpus_of_ranks(identities: list[str], settings: list[str], verdict: str, text: str) -> None:
    gpus = [
        binding.RankGpu("node", "cuda:0", identity, len(setting.split(",")), setting)
        for identity, setting in zip(identities, settings, strict=True)
    ]
    (check,) = probe._check_gpus(OneRank(*gpus))
    assert (check.verdict, check.values["devices"]) == (verdict, ["cuda:0", "cuda:0"])
    assert text in check.text
    assert probe._check_gpus(OneRank(binding.RankGpu("node"), binding.RankGpu("node"))) == []


def test_no_check_fails_here(mpi: str, tmp_path: Path) -> None:
    done = examine(tmp_path, str(mpi_library(mpi)), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = findings(done.stdout)
    assert checks["mpi"]["values"]["path"] == str(mpi_library(mpi))
    assert checks["ranks"]["values"]["ranks"] == 2
    assert checks["ranks"]["values"]["thread_level"] == "MPI_THREAD_MULTIPLE"
    assert checks["exchange"]["values"]["path"] == "in place"
    assert all(checks["windows"]["values"].values())
    assert checks["progress, same node"]["values"]["independent"] is True
    latency = checks["words, same node"]["values"]
    assert 0 < latency["fetch_and_op_us"] <= latency["fetch_and_op_p99_us"]
    assert 0 < latency["compare_and_swap_us"] < 1e5
    bandwidth = checks["payload, same node"]["values"]
    assert set(bandwidth) == {f"{op}_mb_per_s" for op in ("memcpy", "get", "put", "in_place")}
    assert min(bandwidth.values()) > 1
    assert checks["hdf5"]["values"]["swmr"] is True
    assert list(tmp_path.iterdir()) == []  # no file is left behind


@pytest.mark.mpi
def test_under_a_launcher_it_examines_these_ranks() -> None:
    done = run_ranks(3, PROGRAM)
    assert done.codes == [0, 0, 0]
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    assert findings(line)["ranks"]["values"]["ranks"] == 3


def test_between_hosts_the_progress_thread_makes_progress(mpi: str, two_hosts: Hosts) -> None:
    done = run_ranks(2, PROGRAM, mpi=mpi, hosts=two_hosts, timeout=100)
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    checks = findings(line)
    assert checks["ranks"]["values"]["nodes"] == 2
    assert "Get and Put" in checks["exchange"]["values"]["path"]
    assert checks["swaps, other node"]["values"]["swaps"] > 1000
    progress = checks["progress, other node"]["values"]
    assert progress["independent"] is False
    # The target computes for 0.3 s: an operation that waits for it takes at least 0.1 s.
    assert progress["with_progress_thread"]["fetch_and_op_us"] < 0.1e6
    assert progress["with_progress_thread"]["put_us"] < 0.1e6


@pytest.mark.slow
def test_without_an_mpi_library_it_names_the_remedy(tmp_path: Path) -> None:
    done = examine(tmp_path, "/nothing/libmpi.so")
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAILS"))
    assert "/nothing/libmpi.so" in line
    assert "pip install 'mpi_dasgd[mpich]'" in line and "MPI4PY_LIBMPI" in line
    assert "Training would NOT work here" in done.stdout


@pytest.mark.mpi
def test_ranks_that_do_not_end_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPI4PY_LIBMPI", str(mpi_library("mpich")))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    failed = doctor._probe_in_job(2, timeout=0.3)[-1]
    assert (failed.name, failed.verdict) == ("ranks", "fails")
    assert "time limit" in failed.text and "stacks" in failed.text
    assert "stacks of rank 1" in capfd.readouterr().err


def test_a_directory_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    check = environment._check_hdf5()
    assert check.verdict == "fails"
    assert "/proc" in check.text and "run.directory" in check.text


def test_a_small_container_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64 << 20, 0, 64 << 20))
    check = environment._check_shared_memory()
    assert check.verdict == "warning"
    assert "--shm-size" in check.text


def test_kernels_that_were_not_built_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "status", lambda: "NumPy kernels (why)")
    check = environment._check_kernels()
    assert check.verdict == "warning"
    assert check.text.startswith("NumPy kernels (why)")


def test_fewer_than_one_rank_is_refused() -> None:
    with pytest.raises(UserError, match="-n must be at least 1, got 0"):
        doctor.run(0)
