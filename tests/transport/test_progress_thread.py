"""The progress thread: why there is one over a network, and that it does all that it is given."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd.transport.rma.progress_thread import ProgressThread
from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import run_ranks

WINDOW = """
import os, sys, time
import numpy as np
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank = comm.rank
win = MPI.Win.Allocate(1000 * 8, 8, comm=comm)
win.Lock_all(MPI.MODE_NOCHECK)
own = np.frombuffer(win.tomemory(), "i8")
"""


def test_windows_between_hosts(mpi, two_hosts: Hosts):
    program = WINDOW + (
        "assert comm.Split_type(MPI.COMM_TYPE_SHARED).size == 2\n"
        "sent = np.full(1000, 10 + rank); got = np.zeros(1000, 'i8')\n"
        "comm.Barrier()\n"
        "peer = (rank + 2) % 4\n"  # on the other host
        "win.Put(sent, peer); win.Flush(peer)\n"
        "comm.Barrier()\n"
        "win.Sync(); assert (own == 10 + peer).all(), own\n"
        "win.Get(got, peer); win.Flush(peer)\n"
        "assert (got == 10 + rank).all(), got\n"
        "sys.stdout.write(f'{rank} {os.uname().nodename}\\n')\n"
        "win.Unlock_all(); win.Free()\n"
    )
    done = run_ranks(4, program, mpi=mpi, hosts=two_hosts)
    expected = [f"{rank} {two_hosts.names[rank // 2]}" for rank in range(4)]
    assert sorted(done.stdout.splitlines()) == expected


def test_target_outside_mpi_stalls_the_origin(mpi, two_hosts: Hosts, tmp_path: Path):
    """Why there is a progress thread: over TCP nothing completes unless the target calls into MPI.

    The probe must be on a communicator that spans the hosts: MPICH makes no progress over the
    network for COMM_SELF.
    """
    program = f"""{WINDOW}
import threading
from pathlib import Path
own[0] = 0
def probe(end):
    while not end.exists():
        comm.Iprobe()
        time.sleep(0.0005)
def wait_for(file):
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
for helped in (False, True):
    outside, begin, end = (Path(sys.argv[1], name + str(helped)) for name in ("o", "b", "e"))
    comm.Barrier()
    if rank == 0:
        wait_for(outside)
        one = np.ones(1, "i8"); old = np.zeros(1, "i8")
        start = time.monotonic()
        begin.touch()
        win.Fetch_and_op(one, old, 1, 0, MPI.SUM); win.Flush(1)
        sys.stdout.write(str(time.monotonic() - start) + "\\n")
        end.touch()
    else:
        outside.touch()
        wait_for(begin)
        if helped:
            thread = threading.Thread(target=probe, args=(end,))
            thread.start()
            wait_for(end)
            thread.join()
        else:
            time.sleep(1)
comm.Barrier()
win.Unlock_all(); win.Free()
"""
    done = run_ranks(2, program, str(tmp_path), mpi=mpi, hosts=two_hosts)
    alone, helped = map(float, done.stdout.split())
    assert alone >= 1  # the target's
    assert helped < 10  # else only when it had waited for 20 s


@pytest.fixture
def make_thread() -> Iterator[Callable[..., ProgressThread]]:
    """Makes progress threads that are closed at the end of the test."""
    made: list[ProgressThread] = []

    def make(*args: object, **options: object) -> ProgressThread:
        made.append(ProgressThread(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    assert all(thread.close() for thread in made)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_tasks_run_in_order_in_one_thread(make_thread: Callable[..., ProgressThread]) -> None:
    thread = make_thread(lambda: None, 60.0)
    ran: list[tuple[int, int]] = []
    for i in range(100):
        thread.submit(lambda i=i: ran.append((i, threading.get_ident())))
    wait_for(lambda: thread.idle)
    assert [i for i, _ in ran] == list(range(100))
    assert {ident for _, ident in ran} != {threading.get_ident()}
    assert len({ident for _, ident in ran}) == 1
    assert thread.busy_seconds == 0.0


def test_the_thread_finishes_its_tasks_before_it_ends() -> None:
    thread = ProgressThread(lambda: None, 60.0)
    ran: list[int] = []
    for i in range(3):
        thread.submit(lambda i=i: (time.sleep(0.02), ran.append(i)))
    assert thread.close()
    assert ran == [0, 1, 2] and thread.idle
    assert thread.close(), "again does nothing"


def test_mpi_progress_and_the_periodic_task_are_called_at_intervals(
    make_thread: Callable[..., ProgressThread],
) -> None:
    periods: list[float] = []
    calls: list[float] = []
    begun = time.monotonic()
    make_thread(
        lambda: periods.append(time.monotonic()),
        0.05,
        lambda: calls.append(time.monotonic()),
        progress_interval=0.001,
    )
    wait_for(lambda: len(periods) >= 4)
    assert len(calls) > 2 * len(periods)
    assert (np.array(periods) - begun >= 0.05 * np.arange(len(periods))).all()
    assert sum(call < periods[0] for call in calls) == 1, "the periodic task is due at once"


def test_what_fails_in_the_thread_is_raised_by_check(
    make_thread: Callable[..., ProgressThread],
) -> None:
    thread = make_thread(lambda: None, 60.0)
    thread.check()
    thread.submit(lambda: [][0])
    wait_for(lambda: thread._error is not None)
    with pytest.raises(IndexError):
        thread.check()
    assert not thread.idle


def test_close_does_not_wait_for_a_stalled_thread() -> None:
    thread = ProgressThread(lambda: None, 60.0)
    release = threading.Event()
    thread.submit(release.wait)
    wait_for(lambda: thread.busy_seconds > 0.05)
    assert not thread.idle
    assert not thread.close(timeout=0.05)
    release.set()
    assert thread.close()
