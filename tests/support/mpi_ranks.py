"""Runs a piece of Python on several MPI ranks, and says what every rank did when that goes wrong.

    done = run_ranks(2, "from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2")

The ranks are started by `mpi_dasgd.launch`, as a user's are. This file is its own helper program:
``mpi_ranks.py launch`` starts the ranks (on the first fake host, if there are hosts), and each rank
runs ``mpi_ranks.py rank``.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI

    from tests.support.fake_hosts import Hosts
    from tests.support.warm_start import WarmServer

ROOT = Path(__file__).resolve().parents[2]
CI = os.environ.get("CI", "").lower() in ("1", "true")
MPIS = ("mpich", "openmpi")
may_start = True  # whether the running test may start ranks: conftest.py says so


@dataclass(frozen=True)
class Completed:
    """A finished job: verdict of `launch`, exit status of each rank, and what they printed."""

    code: int
    message: str
    codes: list[int | None]
    stdout: str
    stderr: str
    seconds: float

    def report(self) -> str:
        """Everything there is to see, for a failure message."""
        return (
            f"verdict {self.code}, ranks {self.codes}, {self.seconds:.1f} s: {self.message}\n"
            f"--- stdout ---\n{self.stdout[-20000:]}\n--- stderr ---\n{self.stderr[-20000:]}"
        )


def run_ranks(
    n: int,
    program: str | Path,
    *args: str,
    mpi: str = "mpich",
    timeout: float = 120,
    hosts: Hosts | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> Completed:
    """Run `program` on `n` ranks and wait for its end.

    Args:
        n: number of ranks; with hosts they are spread evenly over them, in blocks.
        program: Python code, or the path of a Python file.
        args: its arguments.
        mpi: one of `MPIS`.
        timeout: seconds until the run is stopped and fails, showing the stacks of all ranks.
        hosts: fake hosts to run on; None: this machine.
        env: variables for the ranks.
        check: whether a verdict other than 0 fails the test; a time-out always does.
    """
    with tempfile.TemporaryDirectory(prefix="mpi-dasgd-test-") as name:
        directory = Path(name)
        file = Path(program) if str(program).endswith(".py") else directory / "program.py"
        if file.parent == directory:
            file.write_text(textwrap.dedent(str(program)))
        command = [sys.executable, __file__, "rank", str(file.resolve()), *args]
        request = launch_request(command, n, mpi, timeout, env)
        prefix: list[str] = []
        if hosts is not None:
            each = -(-n // len(hosts.names))
            request["hosts"] = ",".join(f"{host}:{each}" for host in hosts.names)
            request["agent"] = str(hosts.agent)
            prefix = hosts.enter(0)
        start = time.monotonic()
        helper = start_launch(directory, request, prefix)
        try:
            helper.wait(timeout + 40)  # `launch` ends within 20 s of its own limit
        finally:
            helper.kill()
            helper.wait()
        seconds = time.monotonic() - start
        stdout = (directory / "out").read_text(errors="replace")
        stderr = (directory / "err").read_text(errors="replace")
        if helper.returncode != 0:
            raise AssertionError(f"the ranks were not started:\n{stdout}\n{stderr}")
        answer = json.loads((directory / "answer").read_text())
    done = Completed(stdout=stdout, stderr=stderr, seconds=seconds, **answer)
    if done.code == 124 or (check and done.code != 0):
        raise AssertionError(done.report())
    return done


def launch_request(
    command: list[str],
    n: int,
    mpi: str,
    timeout: float | None,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Arguments of `mpi_dasgd.launch.run` for a job with an MPI of the tests."""
    assert may_start, "a test that starts ranks: mark it `mpi`"
    library = mpi_library(mpi)
    if library is None:
        missing(f"no library of {mpi}: `make test` installs it")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **(env or {})}
    environment |= {"MPI4PY_LIBMPI": str(library), "PYTHONPATH": path}
    if (server := _server(path)) is not None:
        command = server.command(command)
    return {"command": command, "n": n, "timeout": timeout, "env": environment}


def launch_command(*arguments: str) -> list[str]:
    """Return the command ``mpi-dasgd launch ARGUMENT...`` of a script of Python.

    It needs PYTHONPATH to be that of `ROOT`, and OMP_NUM_THREADS to be 1.
    """
    server = _server(str(ROOT))
    if server is None:
        return [sys.executable, "-m", "mpi_dasgd", "launch", *arguments]
    program = ROOT / "tests" / "support" / "warm_launch.py"
    return [sys.executable, str(program), server.socket, "launch", *arguments]


@functools.cache
def _server(python_path: str) -> WarmServer | None:
    """The server of this process, of which ranks are copies; None if it cannot be one."""
    from tests.support.warm_start import WarmServer

    as_launch = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, **as_launch}
    try:
        server = WarmServer({**os.environ, **environment})
    except RuntimeError as error:
        if CI:
            raise
        warnings.warn(f"ranks start slowly: {error}", stacklevel=1)
        return None
    atexit.register(server.close)
    return server


def start_launch(
    directory: Path, request: dict[str, Any], prefix: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start ranks without waiting for them; their output comes into files of the directory."""
    (directory / "request").write_text(json.dumps(request))
    with (directory / "out").open("w") as out, (directory / "err").open("w") as err:
        return subprocess.Popen(
            [*prefix, sys.executable, __file__, "launch", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def parallel_assert(comm: MPI.Intracomm, condition: bool, message: str = "") -> None:
    """Assert on all ranks of `comm` together, so that none waits for one that has failed."""
    failed = [rank for rank, good in enumerate(comm.allgather(bool(condition))) if not good]
    assert not failed, f"rank {failed} of {comm.size}: {message}"


def rank_counts(*defaults: int) -> tuple[int, ...]:
    """Numbers of ranks to run a test with: `defaults`, or what MPI_DASGD_TEST_RANKS says."""
    chosen = os.environ.get("MPI_DASGD_TEST_RANKS")
    return (int(chosen),) if chosen else defaults


@functools.cache
def mpi_library(mpi: str) -> Path | None:
    """The library of one of `MPIS`; None if it is not installed."""
    if mpi == "mpich":
        library = Path(sys.prefix) / "lib" / "libmpi.so.12"
    else:
        prefix = os.environ.get("MPI_DASGD_TEST_OPENMPI", ROOT / ".venv" / "openmpi")
        library = Path(prefix) / "lib" / "libmpi.so.40"
    return library if library.exists() else None


def missing(reason: str) -> Any:
    """Skip the test for want of something; in CI, fail."""
    import pytest  # not at the top: the ranks do without it

    (pytest.fail if CI else pytest.skip)(reason)


def _launch(directory: Path) -> None:
    """Start the ranks, in the directory of the request: fake hosts share it."""
    from mpi_dasgd.launch import run

    os.chdir(directory)
    outcome = run(**json.loads(Path("request").read_text()))
    answer = {
        "code": outcome.code,
        "message": outcome.describe(),
        "codes": outcome.codes,
    }
    Path("answer").write_text(json.dumps(answer))


def _rank(file: str, *args: str) -> None:
    """Run a file as the main program; an exception in one rank ends all of them."""
    from mpi_dasgd.launch import enable_stack_dump

    enable_stack_dump()
    # Unbuffered, a line and its end are written apart, and that of another rank comes in between.
    sys.stdout.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    sys.argv = [file, *args]
    try:
        runpy.run_path(file, run_name="__main__")
    except Exception:
        print(traceback.format_exc(), end="", file=sys.stderr, flush=True)
        time.sleep(0.2)  # a launcher drops what it has not forwarded when the job is aborted
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))
    if sys.argv[1] == "launch":
        _launch(Path(sys.argv[2]))
    else:
        _rank(*sys.argv[2:])
