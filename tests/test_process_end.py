"""Ends of a process that is one rank of several: messages, exit codes, and what the others do."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT, launch_command, mpi_library

pytestmark = pytest.mark.concurrent


@dataclass(frozen=True)
class Job:
    """A job that has ended: exit code, and what it printed."""

    code: int
    out: str
    err: str
    seconds: float


def launch_script(
    script: Path, n: int, *arguments: str, mpi: str = "mpich", timeout: int = 120
) -> Job:
    """Run a script on `n` ranks, as a user does."""
    started = time.monotonic()
    done = subprocess.run(
        launch_command("-n", str(n), f"--timeout={timeout}", str(script), *arguments),
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MPI4PY_LIBMPI": str(mpi_library(mpi)),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout + 40,
    )
    assert "Abort(" not in done.stderr and "MPI_ABORT" not in done.stderr, done.stderr
    return Job(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


# A training whose ranks tell each other in files that they have failed.
SCRIPT = """
import atexit, os, sys, threading, time
from pathlib import Path
def say(text): os.write(1, f"{text}\\n".encode())  # at once, beside what other ranks say
atexit.register(say, "early handler")
import mpi_dasgd
from mpi_dasgd import world
from mpi_dasgd.errors import MpiDasgdError, PeerFailed, UserError
from mpi_dasgd.process_end import process_end
atexit.register(say, "late handler")
how, folder = sys.argv[1], Path(sys.argv[2])
w = world.start()
rank = w.rank
if how == "before the training" and rank == 1:
    sys.exit(5)
w.abort_on_exception()
open_file = (folder / f"log{rank}").open("w")
open_file.write("not flushed")

class Training:
    def fail(self, exit_code, error=None):
        (folder / "part").write_text(str(exit_code))
        (folder / "part").rename(folder / "failed")
    def claim_report(self): raise AssertionError("the ranks share a directory")
    def close(self):
        say("closed at the end")
        process_end.leave(self)

process_end.enter(Training())
w.comm.Barrier()

def fail():
    if how == "other hook":
        sys.excepthook = lambda kind, error, trace: print("own hook:", error, file=sys.stderr)
    if how == "exit": sys.exit(3)
    if how == "raise": raise SystemExit("quota")
    if how == "interrupt": raise KeyboardInterrupt
    if how == "bad input": raise UserError("x: expected y")
    raise ZeroDivisionError(f"on purpose, on rank {rank}")

def wait():
    for _ in range(0 if how == "open" else 1000):
        if (folder / "failed").exists():
            raise PeerFailed(1, int((folder / "failed").read_text()))
        time.sleep(0.01)

if how == "thread" and rank == 1:
    threading.Thread(target=fail).start()
    time.sleep(50)
elif how == "all" or (rank == 1 and how not in ("open", "before the training")):
    fail()
wait()
"""

FAILURE = "rank 1 failed and ends the job:\nTraceback"


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("error", 1, FAILURE),
        ("all", 1, " failed and ends the job:\nTraceback"),
        ("thread", 1, FAILURE),
        ("other hook", 1, "own hook: on purpose, on rank 1"),
        ("interrupt", 1, "rank 1: interrupted"),
        ("bad input", 2, "rank 1: error: x: expected y"),
        ("exit", 3, "rank 1 ends with exit code 3 before training.close()"),
        ("raise", 1, "quota\nmpi-dasgd: rank 1 ends with exit code 1 before training.close()"),
    ],
)
def test_one_rank_says_why_it_fails_and_all_end_with_its_exit_code(
    how: str, code: int, message: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = launch_script(script, 3, how, str(tmp_path))
    assert job.code == code, job.err
    assert job.err.count(message) == 1, job.err
    assert job.err.count("Traceback") == message.count("Traceback")
    assert job.err.count("mpi-dasgd: ") == 1, job.err
    assert job.err.splitlines()[-1].startswith("mpi-dasgd launch: ranks ") or code == 2
    assert job.seconds < 40  # a rank sleeps for 50 s
    # Exit handlers run, and files that are open are written; but a thread's failure is sudden.
    ended_well = 3 - (how == "thread")
    assert job.out.count("early handler\n") == job.out.count("late handler\n") == ended_well
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(3)]
    assert logs.count("not flushed") == ended_well


def test_what_is_open_at_the_end_is_closed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = launch_script(script, 2, "open", str(tmp_path))
    assert (job.code, job.err) == (0, "")
    assert job.out.count("closed at the end\n") == 2


def test_others_that_wait_in_mpi_for_a_rank_that_has_ended_are_ended(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = launch_script(script, 2, "before the training", str(tmp_path))
    assert job.code == 5
    assert job.err == (
        "mpi-dasgd launch: rank 1 ended with exit code 5; rank 0 killed by SIGTERM\n"
    )
