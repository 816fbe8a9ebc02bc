"""Collective operations among ranks of which some are taken for dead, or die."""

from __future__ import annotations

from tests.support.mpi_ranks import run_ranks
from tests.support.rank_pool import run_pooled

PROGRAM = """
import time
import numpy as np
from mpi4py import MPI
from mpi_dasgd.errors import PeerLost
from mpi_dasgd.training.surviving_ranks import SurvivingRanks

comm = MPI.COMM_WORLD.Dup()
rank = comm.rank

class Death:
    '''Ranks that die: each some time after the others have begun to wait for it.'''

    def __init__(self, *ranks):
        self.dead, self._ranks, self._start = set(), ranks, time.monotonic()

    def refresh(self):
        for number, dying in enumerate(self._ranks):
            if time.monotonic() - self._start > 0.1 * (number + 1):
                self.dead.add(dying)

def survivors(*dying):
    death = Death(*dying)
    return SurvivingRanks(comm, death.dead, death.refresh)

def vector():
    return np.array([2.0**rank, 1.0])

# all live
ranks = survivors()
assert ranks.allgather(rank) == [0, 1, 2] and (ranks.rank, ranks.size) == (rank, 3)
total = vector()
ranks.sum(total)
assert total.tolist() == [7, 3]
total = vector()
ranks.broadcast(total, 1)
assert total.tolist() == [2, 1]
comm = comm.Dup()  # what was sent to ranks that are not really dead is never received

# one has given up the sum of MPI, which completes on the others: all sum anew
ranks = survivors()
if rank == 0:
    ranks._await = lambda *arguments: SurvivingRanks._await(ranks, *arguments) and False
total = vector()
ranks.sum(total)
assert total.tolist() == [7, 3] and ranks.allgather(ranks._operation) == [3] * 3

# one dies, which leads or not; then the same operations go on
for dying in (2, 0):
    if rank != dying:
        ranks = survivors(dying)
        assert ranks.allgather(rank) == [None if r == dying else r for r in range(3)]
        for _ in range(3):
            total = vector()
            ranks.sum(total)
            assert total.tolist() == [7 - 2**dying, 2]
        total = vector()
        ranks.broadcast(total, 1)
        assert total.tolist() == [2, 1]
        try:
            ranks.broadcast(total, dying)
        except PeerLost as error:
            assert f"rank {dying} is gone, whose model all ranks need" in str(error)
        else:
            raise AssertionError("a broadcast from a dead rank")
    comm = comm.Dup()

# two die, one after the other: the last one is alone
if rank == 1:
    ranks = survivors(0, 2)
    assert ranks.allgather("x") == [None, "x", None]
comm = comm.Dup()  # what was sent to ranks that are not really dead is never received

# the leader dies when it has given the result to one of two: that one leads, and gives it on
if rank == 0:
    parts = [comm.recv(source=source, tag=771) for source in (1, 2)]
    comm.send((1, "result"), 1, 772)
else:
    death = Death(*([0] if rank == 2 else []))
    ranks = SurvivingRanks(comm, death.dead, death.refresh)
    assert ranks._merge(rank, lambda parts: "result") == "result"
    if rank == 1:
        time.sleep(0.2)
        death.dead.add(0)
    assert ranks.allgather(rank) == [None, 1, 2]
comm = comm.Dup()  # what was sent to ranks that are not really dead is never received

# the same in the last operation: the one that has the result attends to the other, and gives it
other = comm.Dup()
if rank == 0:
    parts = [comm.recv(source=source, tag=771) for source in (1, 2)]
    comm.send((1, "result"), 1, 772)
else:
    ranks = survivors(*([0] if rank == 2 else []))
    assert ranks._merge(rank, lambda parts: "result") == "result"
    if rank == 1:
        done = other.irecv(source=2)
        while not done.test()[0]:
            ranks.attend()
    else:
        other.send(None, 1)
comm = comm.Dup()

def take_part_late():
    '''Complete the sum that the others have given up: all ranks must, to leave MPI as it was.'''
    MPI.COMM_WORLD.Barrier()
    if rank == 2:
        comm.Iallreduce(vector(), vector()).Wait()
    else:
        MPI.Request.Waitall(ranks._incomplete)
    MPI.COMM_WORLD.Barrier()

# a rank dies when all have agreed to sum by MPI: the others sum anew, without it
if rank == 2:
    survivors().allgather(True)
else:
    ranks = survivors()
    ranks._dead, ranks._refresh = (late := set()), lambda: None
    agreed = ranks.allgather
    def allgather(own):
        answer = agreed(own)
        ranks._refresh = lambda: late.add(2)
        return answer
    ranks.allgather = allgather
    total = vector()
    ranks.sum(total)
    assert total.tolist() == [3, 2]
take_part_late()

# a rank that lives, and does not come
if rank == 2:
    survivors().allgather(True)
else:
    ranks = SurvivingRanks(comm, set(), lambda: None, timeout=1.0)
    try:
        ranks.sum(vector())
    except PeerLost as error:
        assert f"for ranks {[1 - rank, 2]} for 1 s" in str(error)
    else:
        raise AssertionError("a sum without a rank")
take_part_late()
"""

# Ranks that are killed one after the other, each at the worst moment.
DEATHS = """
import os, signal, time
from pathlib import Path
import numpy as np
from mpi4py import MPI
from mpi_dasgd import launch
from mpi_dasgd.training.surviving_ranks import SurvivingRanks, _Sent

rank = MPI.COMM_WORLD.rank
pids = MPI.COMM_WORLD.allgather(os.getpid())
dead = set()
launch.ready()

def refresh():
    for other, pid in enumerate(pids):
        try:
            ended = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:
            ended = True
        if ended:
            dead.add(other)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def total(size=1):
    array = np.full(size, 2.0**rank)
    ranks.sum(array)
    assert (array == array[0]).all()
    return array[0]

ranks = SurvivingRanks(MPI.COMM_WORLD.Dup(), dead, refresh, timeout=20)
assert total(1 << 18) == 31

# the leader dies when all have agreed to sum by MPI
if rank == 0:
    assert all(ranks.allgather(True))
    die()
assert total(1 << 18) == 30

# the leader dies when it has given a result to the rank that leads next, and to no other
if rank == 1:
    give = ranks._await
    ranks._await = lambda *arguments: die(give(*arguments))
assert ranks.allgather(rank) == [None, 1, 2, 3, 4]
assert total() == 28

# a rank dies when it has sent what the leader has not taken yet
if rank == 2:
    time.sleep(0.5)
if rank == 3:
    ranks._send(2, 771, _Sent(ranks._operation + 1, bytes(1 << 20)))
    ranks._comm.iprobe()
    die()
assert len(ranks.allgather(bytes(1 << 20))[rank]) == 1 << 20
assert total(1 << 18) == 20

# the process of the leader ends when it has the result, which the other is late to take
if rank == 4:
    ranks._result_of = lambda leader: time.sleep(0.5) or SurvivingRanks._result_of(ranks, leader)
assert len(ranks.allgather(bytes(1 << 20))[rank]) == 1 << 20
os._exit(0)
"""


def test_ranks_that_live_gather_and_sum_without_those_that_die(mpi: str) -> None:
    run_pooled(3, PROGRAM, mpi=mpi)


def test_ranks_killed_inside_of_an_operation_do_not_end_those_of_the_others(mpi: str) -> None:
    done = run_ranks(5, DEATHS, mpi=mpi)
    assert done.codes == [137, 137, 0, 137, 0], done.report()
