"""Ranks that are copies of a running process are as good as processes of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hosts import isolated_hosts
from tests.support.mpi_ranks import ROOT, launch_request, run_ranks

pytestmark = pytest.mark.concurrent

STARTED = ROOT / "tests" / "programs" / "started.py"
COLD = {"PYTHONHASHSEED": "0"}  # only a new process heeds it


def started(**arguments: Any) -> list[dict[str, Any]]:
    """What two ranks are given."""
    done = run_ranks(2, STARTED, "an argument", **arguments)
    ranks: list[dict[str, Any]] = json.loads(done.stdout)
    for rank in ranks:
        rank["state"].pop("directory")  # of each job
    return ranks


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_a_copy_is_given_what_a_new_process_is(mpi: str) -> None:
    copies, processes = started(mpi=mpi), started(mpi=mpi, env=COLD)
    for copy, process in zip(copies, processes, strict=True):
        assert copy["state"] == process["state"]
        assert copy["state"]["launched"]
        assert copy["imported"] == {"slow": ["h5py", "torch", "torch._dynamo"], "ours": []}
        assert process["imported"] == {"slow": [], "ours": []}
    for draws in zip(*(rank["draws"] for rank in copies), strict=True):
        assert len(set(draws)) == 2, "ranks draw the same"


@pytest.mark.parametrize(
    ("variables", "is_copy"), [({"GLOO_SOCKET_IFNAME": "lo"}, True), ({"MKL_VERBOSE": "0"}, False)]
)
def test_only_what_is_heeded_early_takes_a_new_process(
    variables: dict[str, str], is_copy: bool
) -> None:
    assert [bool(rank["imported"]["slow"]) for rank in started(env=variables)] == [is_copy] * 2


def test_a_copy_joins_the_host() -> None:
    with isolated_hosts(2) as hosts:
        copies = started(hosts=hosts)
    assert [copy["state"]["host"] for copy in copies] == hosts.names
    for name in zip(*(copy["state"]["namespaces"] for copy in copies), strict=True):
        assert len(set(name)) == 2
    assert all("torch" in copy["imported"]["slow"] for copy in copies)


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    """Start a program as a rank is started, but without MPI."""
    file = folder / "program.py"
    file.write_text(
        f"import atexit, os, signal, sys, time\nassert 'torch' in sys.modules\n{program}"
    )
    request = launch_request([sys.executable, str(file)], 1, "mpich", None)
    as_launch = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        request["command"],
        env={**os.environ, **request["env"], **as_launch},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("os._exit(7)", 7, ""),
        ("atexit.register(print, 'the end'); sys.exit(3)", 3, "the end\n"),
        ("raise ValueError('no')", 1, "ValueError: no"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.abort()", -signal.SIGABRT, "Fatal Python error: Aborted"),
    ],
)
def test_the_proxy_ends_as_the_copy_does(ending: str, code: int, said: str, tmp_path: Path) -> None:
    process = start(ending, tmp_path)
    output = "".join(process.communicate(timeout=30))
    assert process.returncode == code
    assert said in output


def test_the_proxy_passes_signals_on(tmp_path: Path) -> None:
    process = start(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); print('ready'); time.sleep(60)",
        tmp_path,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(30) == 5


def test_a_copy_is_killed_with_its_proxy(tmp_path: Path) -> None:
    process = start("print(os.getpid()); time.sleep(60)", tmp_path)
    assert process.stdout is not None
    copy = os.pidfd_open(int(process.stdout.readline()))
    process.kill()
    process.wait()
    assert select.select([copy], [], [], 30)[0], "it lives on"
    os.close(copy)
