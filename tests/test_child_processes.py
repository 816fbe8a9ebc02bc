"""Workers of a DataLoader, and other children of a rank: they work, or are refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpi_dasgd import child_processes
from mpi_dasgd.errors import UserError
from mpi_dasgd.launch.rank_status import Ranks
from tests.support.mpi_ranks import ROOT, mpi_library, run_ranks
from tests.support.rank_pool import run_pooled

PROGRAM = ROOT / "tests" / "programs" / "loader_workers.py"


def test_workers_of_every_start_method_serve_ranks(mpi: str) -> None:
    """Spawned workers found the launcher of their rank, and hung or ended the job."""
    done = run_ranks(2, PROGRAM, mpi=mpi, timeout=120)
    assert sorted(done.stdout.splitlines()) == ["rank 0: 48 samples", "rank 1: 48 samples"]


def test_children_know_no_launcher_and_ignore_its_signal(mpi: str) -> None:
    """MPICH's launcher reports a lost rank by a signal that ended the others' spawned workers."""
    run_pooled(
        2,
        """
        import os, subprocess, sys, torch, mpi_dasgd
        from pathlib import Path
        model = torch.nn.Linear(2, 1)
        with mpi_dasgd.Decentralized(model, torch.optim.SGD(model.parameters(), lr=0.1)):
            child = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True)
            blocked = next(l for l in child.stdout.splitlines() if l.startswith("SigBlk"))
            assert int(blocked.split()[1], 16) >> 9 & 1, blocked
            accepting = 0
            for task in Path("/proc/self/task").iterdir():
                blocked = next(
                    l for l in (task / "status").read_text().splitlines() if l.startswith("SigBlk")
                )
                accepting += not int(blocked.split()[1], 16) >> 9 & 1
            assert accepting, "MPI itself is to hear of it"
        assert not {"PMI_FD", "PMI_PORT", "PMIX_NAMESPACE", "PMIX_RANK"} & set(os.environ)
        """,
        mpi=mpi,
    )


@pytest.mark.concurrent
def test_script_without_main_guard_is_told_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, mpi_dasgd\n"
        "from torch.utils.data import DataLoader\n"
        "model = torch.nn.Linear(1, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "training = mpi_dasgd.Decentralized(model, optimizer, 'alone')\n"
        "loader = DataLoader([1.0, 2.0], num_workers=2, multiprocessing_context='spawn')\n"
        "print('read', list(loader))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPI_DASGD_RANKS": "1"}
    environment["MPI4PY_LIBMPI"] = str(mpi_library("mpich"))
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0 and "read" not in done.stdout
    assert done.stderr.count("a worker process of script.py imports it again") == 1, done.stderr
    assert 'if __name__ == "__main__"' in done.stderr


def test_fork_of_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    child_processes.refuse_in_child(2, 1)
    monkeypatch.setattr(child_processes, "_rank_process", os.getpid() + 1)
    with pytest.raises(UserError, match="forked from rank 1"):
        child_processes.refuse_in_child(2, 1)


def test_process_that_a_rank_has_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by torch.multiprocessing.spawn, in scripts written for DistributedDataParallel."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    child_processes.refuse_in_child(1, 0)  # no launcher: a job of one rank, wherever it runs
    for name in [name for name in os.environ if name.startswith(("PMI_", "PMIX_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"was started by rank 1 with multiprocessing"):
        child_processes.refuse_in_child(2, 1)
    with Path(os.devnull).open() as file, socket.socket() as connection:
        monkeypatch.setenv("PMI_FD", str(file.fileno()))  # a number that now means something else
        with pytest.raises(UserError, match="multiprocessing"):
            child_processes.refuse_in_child(2, 1)
        monkeypatch.setenv("PMI_FD", str(connection.fileno()))
        child_processes.refuse_in_child(2, 1)  # a program that trains in a fork
    monkeypatch.setenv("PMI_FD", "987")
    with pytest.raises(UserError, match="multiprocessing"):
        child_processes.refuse_in_child(2, 1)


def test_launch_kills_workers_that_a_killed_rank_has_left(tmp_path: Path) -> None:
    """Those of a fork server watch their server only, which waits for them."""
    sleep = "from multiprocessing.forkserver import main; import time; time.sleep(60)"
    other = "import time; time.sleep(60)"
    status = {**os.environ, "MPI_DASGD_STATUS": str(tmp_path)}
    worker = subprocess.Popen([sys.executable, "-c", sleep], env=status)
    foreign = subprocess.Popen([sys.executable, "-c", sleep])
    program = subprocess.Popen([sys.executable, "-c", other], env=status)
    try:
        time.sleep(0.2)  # until they are what they are
        Ranks(tmp_path, 1, "ssh").kill_workers()
        assert worker.wait(10) == -signal.SIGKILL
        assert foreign.poll() is None and program.poll() is None
    finally:
        for process in (worker, foreign, program):
            process.kill()
            process.wait()
