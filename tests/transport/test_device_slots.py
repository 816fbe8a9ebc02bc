"""Payload slots on a device, by real ranks, on regions in files instead of memory of GPUs."""

from __future__ import annotations

import json

import pytest

from tests.support.mpi_ranks import ROOT, rank_counts, run_ranks
from tests.support.rank_pool import run_pooled

PROGRAM = ROOT / "tests" / "programs" / "device_slots.py"


@pytest.mark.parametrize("default", [2, 4])
def test_models_are_exchanged_in_place_and_all_is_freed_in_order(mpi: str, default: int) -> None:
    (n,) = rank_counts(default)
    found = json.loads(run_pooled(n, PROGRAM, "exchange", mpi=mpi).stdout)
    assert found["path"] == "in place (CUDA IPC)"
    assert found["conserved"]
    assert found["left"] == [0] * n
    reachable = min(2, n - 1)  # on a ring
    for events in found["events"]:
        kinds = [kind for kind, _ in events]
        assert kinds == ["work", *["opened region"] * reachable, "own region"]
    closed = [when for events in found["events"] for kind, when in events if "opened" in kind]
    freed = [when for events in found["events"] for kind, when in events if "own" in kind]
    assert max(closed) < min(freed), "a region was freed that another rank had open"


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("allocation", "rank 1: late:0: no room for 40960 bytes"),
        ("opening", "rank 1: that of rank 0, late:0: late:0: cudaIpcOpenMemHandle: invalid"),
        ("failure", "rank 1: late:0: the late device was told to fail"),
    ],
)
def test_what_one_rank_cannot_have_is_an_error_of_all(mpi: str, mode: str, reason: str) -> None:
    found = json.loads(run_pooled(2, PROGRAM, mode, mpi=mpi).stdout)
    (message, on_all_ranks, _), other = found["errors"]
    assert [message, on_all_ranks] == other[:2] and on_all_ranks
    assert message.startswith("transport.memory: 'ipc' needs ") and reason in message
    assert message.endswith("what `mpi-dasgd doctor` says")
    assert found["left"] == [0, 0]


def test_where_a_rank_has_died_nothing_is_freed(mpi: str) -> None:
    done = run_ranks(3, PROGRAM, "death", mpi=mpi, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 2, done.report()
    for report in reports:
        assert "ranks [2] are gone: windows cannot be freed" in report["lost"]
        assert report["events"] == ["work"] and report["left"] == 1
