"""Ranks that wait in MPI for one that has ended: they end soon, and one message says for whom."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mpi_dasgd import launch
from mpi_dasgd.launch.deadlock import CLOSED, CONSTRUCTING, LEAVING, READY, SET_UP, find_deadlock
from tests.support.mpi_ranks import ROOT, mpi_library

pytestmark = pytest.mark.concurrent


@pytest.mark.parametrize(
    ("codes", "stages", "kind", "missing", "waiting"),
    [
        # all run, or what has ended is not waited for
        ({}, {0: CONSTRUCTING, 1: READY, 2: SET_UP}, None, (), ()),
        ({1: 137}, {0: READY, 1: READY, 2: READY}, None, (), ()),
        ({1: 0}, {0: READY, 1: LEAVING, 2: CLOSED}, None, (), ()),
        ({1: 0}, {0: SET_UP, 1: SET_UP, 2: SET_UP}, None, (), ()),  # of a command that uses no MPI
        ({0: 0, 1: 0, 2: 0}, {}, None, (), ()),
        # a rank that was killed
        ({1: 137}, {0: SET_UP, 1: SET_UP, 2: READY}, "loss", (1,), (0,)),
        ({1: 137}, {0: CONSTRUCTING, 2: ""}, "loss", (1,), (0, 2)),
        # one that ends, or has ended, while others construct
        ({1: 0}, {0: CONSTRUCTING, 2: READY}, "absence", (1,), (0,)),
        ({}, {0: CONSTRUCTING, 1: LEAVING, 2: CONSTRUCTING}, "absence", (1,), (0, 2)),
        ({1: 0}, {0: CONSTRUCTING, 1: LEAVING, 2: LEAVING}, "absence", (1, 2), (0,)),
        # all others have done all, but cannot finalize MPI
        ({1: 137}, {0: LEAVING, 1: CLOSED, 2: LEAVING}, "end", (1,), (0, 2)),
        ({1: 137}, {0: LEAVING, 1: LEAVING, 2: LEAVING}, "end", (1,), (0, 2)),
        ({1: 0}, {0: LEAVING, 1: CLOSED, 2: LEAVING}, "end", (1,), (0, 2)),  # by os._exit
        ({1: 137}, {0: LEAVING, 1: CLOSED, 2: CLOSED}, None, (), ()),  # rank 2 may still evaluate
        ({1: 0}, {0: LEAVING, 1: LEAVING, 2: LEAVING}, None, (), ()),  # they end soon
    ],
)
def test_deadlock_is_known_from_stages_and_exit_codes(codes, stages, kind, missing, waiting):
    found = find_deadlock(3, codes, stages)
    if kind is None:
        assert found is None
    else:
        assert found is not None
        assert (found.kind, found.missing, found.waiting) == (kind, missing, waiting)


SCRIPT = """
import os, signal, sys, time
how = sys.argv[1]
is_last = "1" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK"))
if how == "no MPI" and is_last: sys.exit(0)
if how == "only MPI":
    from mpi4py import MPI
import mpi_dasgd, torch
if how == "only MPI" and is_last: sys.exit(0)
def train():
    model = torch.nn.Linear(2, 2)
    training = mpi_dasgd.Decentralized(model, torch.optim.SGD(model.parameters(), lr=0.1))
    training.close()
train()
if how == "one of two":
    if is_last: sys.exit(0)
    train()
if how == "killed" and is_last: os.kill(os.getpid(), signal.SIGKILL)
if how == "exits" and is_last: os._exit(0)
if how in ("killed", "exits"): time.sleep(3)  # longer than ranks in a deadlock have
os.write(1, b"evaluated\\n")
"""


@pytest.mark.parametrize(
    ("how", "library", "code", "output", "message"),
    [
        ("no MPI", "mpich", 2, "", "error: rank 1 ended before mpi_dasgd.Decentralized(...), for"),
        ("only MPI", "openmpi", 2, "", "for which ranks [0] wait; every rank must construct it"),
        ("one of two", "mpich", 2, "", "for which ranks [0] wait; every rank must construct it"),
        (
            *("killed", "mpich", 0, "evaluated\n"),
            "warning: rank 1 killed by SIGKILL after training.close(), so that the others could "
            "not finalize MPI; rank 0 ended with exit code 0",
        ),
        (
            *("exits", "mpich", 0, "evaluated\n"),
            "warning: rank 1 ended with exit code 0 after training.close(), so that the others",
        ),
        ("killed", "openmpi", 0, "evaluated\n", "warning: rank 1 killed by SIGKILL"),
    ],
)
def test_ranks_do_not_wait_for_one_that_has_ended(
    how, library, code, output, message, tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPI4PY_LIBMPI", str(mpi_library(library)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("mpi_dasgd.launch.supervisor._FAILURE_GRACE", 1.0)
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    started = time.monotonic()
    assert launch.launch(2, [str(script), how], timeout=50) == code
    assert time.monotonic() - started < 40
    captured = capfd.readouterr()
    assert captured.out == output
    assert message in captured.err
    assert captured.err.count("\n") == 1, captured.err
