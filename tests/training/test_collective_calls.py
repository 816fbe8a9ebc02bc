"""Collective calls among scripted ranks: who waits for whom, and who will never come."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.collective_calls import Call, CollectiveCalls, Phase, refuse_mismatch
from mpi_dasgd.transport.activity import Activity, ReportedActivity
from mpi_dasgd.transport.membership import DEPARTED, FINISHED, RUNNING


class Ranks:
    """Words of three ranks; `on_look` is what the others do between two looks of rank 0."""

    def __init__(self, on_look: Callable[[Ranks], None] = lambda ranks: None) -> None:
        self.rank = 0
        self.now = 0.0
        self.membership = SimpleNamespace(
            status=[RUNNING] * 3,
            calls=[0] * 3,
            activities=[ReportedActivity()] * 3,
            dead=set(),
            publish_call=self._publish,
        )
        self._on_look = on_look
        self.release = SimpleNamespace(is_pending=False)  # of rank 0

    def _publish(self, word: int) -> None:
        assert not self.release.is_pending, "others go on, and look for what was given away"
        assert word >> 4 >= self.membership.calls[0] >> 4, "others may have read the newer word"
        self.membership.calls[0] = word

    def put(self, rank: int, call: int, phase: Phase, completed: int = 0) -> None:
        self.membership.calls[rank] = completed << 8 | phase << 4 | call

    def gradients_of(self, rank: int) -> int:
        return 5 + int(self.now)

    def refresh_progress(self) -> None:
        self.now += 0.5
        self._on_look(self)

    def poll_until(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            refuse: Any = self
            refuse_mismatch(refuse)
            self.release.is_pending = False  # the device passes


def _calls(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> CollectiveCalls:
    clock = SimpleNamespace(monotonic=lambda: ranks.now)
    monkeypatch.setattr("mpi_dasgd.training.collective_calls.time", clock)
    transport: Any = ranks
    return CollectiveCalls(transport, transport)


def test_no_phase_is_told_before_memory_was_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def come(ranks: Ranks) -> None:
        for rank in (1, 2):
            ranks.put(rank, Call.PAUSED, Phase.OUTSIDE, completed=1)

    ranks = Ranks(come)
    calls = _calls(ranks, monkeypatch)
    for call in (
        lambda: calls.enter(Call.PAUSED),
        lambda: calls.reach(Phase.LEFT, lambda: None),
        lambda: calls.leave(lambda: None),
    ):
        ranks.release.is_pending = True
        call()
        assert not ranks.release.is_pending


def _refuse(ranks: Ranks) -> None:
    transport: Any = ranks
    refuse_mismatch(transport)


def test_a_rank_waits_for_all_that_live_and_does_other_things_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def come(ranks: Ranks) -> None:
        if ranks.now == 1:
            ranks.put(1, Call.AVERAGE, Phase.QUIET)  # is farther already
        if ranks.now == 2:
            ranks.membership.dead.add(2)

    ranks, times = Ranks(come), []
    calls = _calls(ranks, monkeypatch)
    calls.enter(Call.AVERAGE)
    assert ranks.membership.calls[0] == Phase.ENTERED << 4 | Call.AVERAGE
    calls.reach(Phase.STOPPED, lambda: times.append(ranks.now))
    assert ranks.membership.calls[0] == Phase.STOPPED << 4 | Call.AVERAGE
    assert times == [0.5, 1, 1.5]
    assert calls.have_reached(Phase.ENTERED) and not calls.have_reached(Phase.LEFT)
    ranks.put(1, Call.NONE, Phase.OUTSIDE, completed=1)
    calls.leave(lambda: None)
    assert ranks.membership.calls[0] == 1 << 8
    calls.enter(Call.PAUSED)
    ranks.put(1, Call.AVERAGE, Phase.STOPPED, completed=2)  # has been in this one, too
    calls.reach(Phase.QUIET, lambda: None)
    calls.leave(None)
    assert ranks.membership.calls[0] == 2 << 8


def test_the_user_is_told_for_whom_a_call_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def come_late(ranks: Ranks) -> None:
        if ranks.now == 25:
            ranks.put(1, Call.AVERAGE, Phase.STOPPED)

    ranks = Ranks(come_late)
    ranks.put(2, Call.AVERAGE, Phase.STOPPED)
    calls = _calls(ranks, monkeypatch)
    calls.enter(Call.AVERAGE)
    calls.reach(Phase.STOPPED, lambda: None)
    assert [record.getMessage() for record in caplog.records] == [
        "rank 0 waits in average() for rank 1, which is in the program's own code after its step 15"
    ]


def test_a_rank_that_has_left_training_sees_what_the_others_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks()
    calls = _calls(ranks, monkeypatch)
    assert calls.pending() == Call.NONE
    ranks.put(2, Call.PAUSED, Phase.ENTERED)
    assert calls.pending() == Call.PAUSED
    calls.join(Call.PAUSED)
    assert ranks.membership.calls[0] == Phase.ENTERED << 4 | Call.PAUSED
    calls.leave(None)
    assert calls.pending() == Call.NONE, "that call is over for this rank"
    ranks.membership.status[0] = FINISHED
    calls.enter(Call.AVERAGE)
    after_end = ranks.membership.calls[0] & 0xF
    ranks.put(2, after_end, Phase.ENTERED, completed=1)
    assert calls.pending() == Call.NONE, "a call after the end is for ranks to make themselves"


def test_ranks_that_will_never_meet_are_found_in_the_words_of_all() -> None:
    ranks = Ranks()
    _refuse(ranks)
    ranks.put(1, Call.AVERAGE, Phase.STOPPED)
    _refuse(ranks)
    ranks.put(2, Call.PAUSED, Phase.ENTERED)
    words = r"average\(\): it is collective, but rank 1 is in average\(\) and rank 2 in paused\(\)"
    with pytest.raises(UserError, match=words):
        _refuse(ranks)
    ranks.put(2, Call.NONE, Phase.OUTSIDE)
    ranks.membership.activities[2] = ReportedActivity(Activity.FINISHING, 3)
    _refuse(ranks)  # it takes part
    ranks.membership.activities[2] = ReportedActivity(Activity.CLOSING, 3)
    with pytest.raises(UserError, match=r"rank 1 is in average\(\) and rank 2 in close\(\)"):
        _refuse(ranks)
    ranks.membership.activities[2] = ReportedActivity()
    ranks.membership.status[2] = DEPARTED
    with pytest.raises(UserError, match=r"rank 1 is in average\(\) and rank 2 in close\(\)"):
        _refuse(ranks)
    ranks.membership.dead.add(2)
    _refuse(ranks)


def test_ranks_that_have_left_a_call_are_not_missed_in_it() -> None:
    ranks = Ranks()
    ranks.put(1, Call.AVERAGE, Phase.QUIET)  # is about to leave
    ranks.put(2, Call.PAUSED, Phase.ENTERED, completed=1)  # has left, made a step, and stops again
    ranks.put(0, Call.NONE, Phase.OUTSIDE, completed=1)
    _refuse(ranks)
    ranks.membership.activities[0] = ReportedActivity(Activity.CLOSING, 3)
    _refuse(ranks)
