"""The order of control words on late devices of real ranks, with its negative controls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.late_faults import AT_ONCE
from tests.support.mpi_ranks import ROOT, run_ranks
from tests.support.rank_pool import run_pooled

pytestmark = pytest.mark.mpi

PROGRAMS = ROOT / "tests" / "programs"
RANKS = {"mpich": 2, "openmpi": 4}
DELAYS = ("--late", "0.0002", "0.003")


def report_of(mpi: str, program: str, *args: str, ranks: int | None = None) -> Any:
    """Run a program, and return what rank 0 reports."""
    return json.loads(
        run_pooled(
            RANKS[mpi] if ranks is None else ranks, PROGRAMS / program, *args, mpi=mpi, timeout=100
        ).stdout
    )


def test_nothing_is_torn_or_lost(mpi: str) -> None:
    args = ["--words", "node", "--publications", "800", "--messages", "800"]
    report = report_of(mpi, "stress.py", *args, "--late", "0", "0.002")
    assert report["found"] == {} and report["words"] == "NodeWords"
    done = report["done"]
    assert done["published"] >= 800 and done["sent"] == done["received"] >= 800
    assert done["claimed"] > 50 and done["read"] > 100 and done["cancelled"] > 5


def test_the_sum_is_conserved_exactly(mpi: str) -> None:
    reports = report_of(mpi, "conservation.py", "--exchanges", "500", *DELAYS, "exact", "lattice8")
    for report in reports.values():
        assert report["enough"] and report["absorbed"] == report["exchanges"]
        assert report["launches"] > 500 and report["wrong"] == 0 == report["waits"]
        assert report["error"] <= report["tolerance"] < 0.1 < report["size"]
    assert reports["exact"]["error"] == 0.0


@pytest.mark.parametrize("fault", AT_ONCE)
def test_each_fault_is_seen(fault: str) -> None:
    """The test above can fail: where memory is given away at once."""
    args = ["--exchanges", "300", "--late", "0.001", "0.006", "--at-once", fault, "--limit", "10"]
    if fault == "free":  # else a slot is used again only when the device has long passed
        args += ["--inbox-slots", "1"]
    report = report_of("mpich", "conservation.py", *args, "exact", ranks=3)["exact"]
    assert report["wrong"] > 10
    assert (report["error"] > report["tolerance"]) == (fault in ("all", "send"))


def test_an_end_before_the_swaps_are_made_is_seen() -> None:
    """A rank says that it has finished although its last delta is still to be sent."""
    args = ["--exchanges", "40", "--late", "0.05", "0.06", "--at-once", "end", "--limit", "10"]
    # The last step of a run may have found no partner.
    reports = report_of("mpich", "conservation.py", *args, "exact", "float", "lattice8", ranks=2)
    assert any(report["error"] > 0.1 > report["tolerance"] for report in reports.values())


def test_training_conserves_the_sum_in_memory_of_the_host_and_of_devices(mpi: str) -> None:
    """Through `Decentralized`, from the first step to `finish` with swaps that are pending."""
    args = ["--seconds", "3", "--longest", "3e-3", "--codecs", "grid", "lattice8"]
    reports = report_of(mpi, "late_soak.py", *args)
    assert len(reports) == 8
    for report in reports:
        assert report["absorbed"] == report["exchanges"] > 10
        assert report["given_back"] == report["taken_away"] == report["outside"] == 0
        assert report["error"] <= report["tolerance"] < 0.1 < report["size"]
        assert report["error"] == 0.0 or report["codec"] != "grid"
        assert report["corrupt"] == 0


def test_training_has_the_bits_of_the_host(mpi: str) -> None:
    cases = [part for a in ("adpsgd", "swarm") for c in ("lattice8", "none") for part in (a, c)]
    run_pooled(RANKS[mpi], PROGRAMS / "late_bits.py", *cases, mpi=mpi, timeout=100)


def test_the_others_go_on_when_a_rank_is_killed_while_its_device_writes() -> None:
    done = run_ranks(3, PROGRAMS / "late_kill.py", "ipc", check=False)
    assert done.codes == [0, 0, 137], done.report()
    reports: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        reports |= json.loads(line)
    assert reports.keys() == {"0", "1"}, done.report()
    for report in reports.values():
        assert report["dead"] == [2] and report["wrong"] == 0
        assert report["sent"] >= report["enough"] > 0
