"""Why there is a progress thread: over a network nothing completes while the target is outside MPI."""

from __future__ import annotations

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


def test_target_outside_mpi_stalls_the_origin(mpi, two_hosts: Hosts):
    """Why there is a courier: over TCP nothing completes unless the target calls into MPI.

    The probe must be on a communicator that spans the hosts: MPICH makes no progress over the
    network for COMM_SELF.
    """
    program = f"""{WINDOW}
import threading
own[0] = 0
def probe(until):
    while time.monotonic() < until:
        comm.Iprobe()
        time.sleep(0.0005)
for helped in (False, True):
    comm.Barrier()
    if rank == 0:
        time.sleep(0.3)
        one = np.ones(1, "i8"); old = np.zeros(1, "i8")
        start = time.monotonic()
        win.Fetch_and_op(one, old, 1, 0, MPI.SUM); win.Flush(1)
        sys.stdout.write(str(time.monotonic() - start) + "\\n")
    else:
        thread = threading.Thread(target=probe, args=(time.monotonic() + 1.5,))
        if helped: thread.start()
        time.sleep(1.5)
        if helped: thread.join()
comm.Barrier()
win.Unlock_all(); win.Free()
"""
    done = run_ranks(2, program, mpi=mpi, hosts=two_hosts)
    alone, helped = map(float, done.stdout.split())
    assert alone > 0.9  # the rest of the target's 1.5 s
    assert helped < 0.4
