"""Membership: what ranks report of themselves, and when a silent one is dead."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mpi_dasgd.codecs import Layout
from mpi_dasgd.errors import PeerFailed
from mpi_dasgd.transport import membership
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.membership import DEPARTED, FAILED, FINISHED, RUNNING, Membership
from mpi_dasgd.transport.virtual.memory import SharedMemory

LAYOUT = Layout(codec=0, elements=8, payload_dtype=np.dtype(np.float32), payload_items=8)


def make_memory(ranks: int) -> SharedMemory:
    return SharedMemory(LAYOUT, ranks)


def test_membership_shows_what_others_report() -> None:
    memory = make_memory(3)
    members = [Membership(memory, rank, 3, heartbeat_timeout=1.0) for rank in range(3)]
    members[1].report_samples(40)
    members[2].report_samples(2)
    members[2].publish_status(FINISHED)
    members[0].report_samples(100)
    assert members[0].total_samples == 100
    members[0].refresh(range(3))
    assert members[0].samples == [100, 40, 2] and members[0].total_samples == 142
    assert members[0].status == [RUNNING, RUNNING, FINISHED]
    members[1].report_gradients(4)
    members[1].report_activity(Activity.SHADOWING)
    members[0].refresh_progress(range(3))
    assert members[0].gradients == [0, 4, 0]
    assert members[0].activities[1] == (Activity.SHADOWING, 4)
    assert members[0].activities[2] == (Activity.OWN_CODE, 0)
    members[1].publish_last_step(17)
    assert [members[0].read_last_step(rank) for rank in range(3)] == [0, 17, 0]
    assert [one.claim_error_report() for one in reversed(members)] == [True, False, False]


def test_a_failure_is_that_of_the_rank_that_is_its_cause() -> None:
    memory = make_memory(4)
    members = [Membership(memory, rank, 4, heartbeat_timeout=1.0) for rank in range(4)]

    def failure(observer: int) -> tuple[int, int]:
        members[observer].refresh(range(4))
        with pytest.raises(PeerFailed) as caught:
            members[observer].check_failures()
        return caught.value.rank, caught.value.exit_code

    members[2].publish_status(FAILED, 7)
    assert failure(0) == (2, 7)
    members[0].publish_status(FAILED, 7, cause=2)
    assert failure(1) == failure(3) == (2, 7)
    assert failure(2) == (2, 7)  # its own: it knows already
    members[3].publish_status(FAILED, 255)
    assert failure(3) == (3, 255) and failure(0) == (2, 7)


def test_a_silent_rank_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=lambda: now[0]))
    memory = make_memory(6)
    members = [Membership(memory, rank, 6, heartbeat_timeout=1.0) for rank in range(6)]
    members[2].publish_status(FINISHED)
    members[3].publish_status(FAILED)
    members[4].publish_status(DEPARTED)
    for moment in range(31):
        now[0] = 0.1 * moment
        members[1].send_heartbeat(memory)
        if moment < 5:
            members[5].send_heartbeat(memory)
        members[0].detect_failures(range(6), memory)
        expected = {2} if moment > 10 else set()
        expected |= {5} if moment > 14 else set()
        assert members[0].dead == expected, moment


def test_a_pause_of_the_watcher_itself_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=lambda: now[0]))
    memory = make_memory(2)
    watcher = Membership(memory, 0, 2, heartbeat_timeout=1.0)
    for _ in range(4):
        watcher.detect_failures(range(2), memory)
        now[0] += 100
    assert watcher.dead == set()
