"""The canary for windows, on memory of the host: right bytes pass, and wrong ones are seen."""

from __future__ import annotations

from tests.support.rank_pool import run_pooled

PROGRAM = """
import sys
from mpi_dasgd.doctor import windows

code = windows.main(["host", "1"])
assert code == 0, code
original = windows._pattern
calls = 0

def torn(xp, nbytes, rank, turn):
    global calls
    calls += 1
    bytes_ = original(xp, nbytes, rank, turn)
    bytes_[-1] += calls == 3  # of what this rank puts
    return bytes_

from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    windows._pattern = torn
assert windows.main(["host", "1"]) == 3
windows._pattern = original
"""


def test_bytes_of_put_and_get_are_verified(mpi: str) -> None:
    first, second = run_pooled(2, PROGRAM, mpi=mpi).stdout.splitlines()[-2:]
    assert first.startswith("WINDOW ok: host memory, get ") and "GB/s; " in first
    assert second.startswith("WINDOW WRONG BYTES: host memory, get ")
