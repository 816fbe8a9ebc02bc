"""Waiting for other ranks, and the end of all exchanges, among scripted ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_dasgd.errors import Diverged, PeerLost
from mpi_dasgd.training.shutdown import drain, leave
from mpi_dasgd.training.waiter import PEER_CHECK_SECONDS, Waiter
from mpi_dasgd.transport.activity import Activity, ReportedActivity
from mpi_dasgd.transport.membership import FAILED, FINISHED, RUNNING, Membership


class Clock:
    """Time that passes in sleep only, and a microsecond per call."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 1e-6
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time of the modules under test."""
    clock = Clock()
    monkeypatch.setattr("mpi_dasgd.training.waiter.time", clock)
    monkeypatch.setattr("mpi_dasgd.training.stall.time", clock)
    return clock


class Endpoint:
    """Transport of rank 0 of three; `on_refresh` says what becomes of the others meanwhile."""

    rank, size = 0, 3

    def __init__(self, on_refresh: Callable[[Endpoint], None] = lambda endpoint: None) -> None:
        self.membership = SimpleNamespace(
            status=[RUNNING] * 3, calls=[0] * 3, dead=set(), publish_status=self._publish,
            gradients=[5, 6, 7], samples=[50, 60, 70], activities=[ReportedActivity()] * 3,
            report_activity=self._report, is_unreachable=lambda rank: False,
            exit_codes=[0, 9, 0], causes=[0, 1, 2], _rank=0, news=[0], reads_in_steps=False,
            check_failures=lambda: Membership.check_failures(self.membership),  # type: ignore[arg-type]
        )  # fmt: skip
        self.reported: list[Activity] = []
        self.refreshed = self.flushed = 0
        self.absorbed = self.flushed_after = 0  # calls, and how many were made before a flush
        self.unsent = 0
        self._on_refresh = on_refresh

    def _publish(self, status: int) -> None:
        assert self.is_flushed(), "it has stopped before all was sent"
        self.membership.status[0] = status

    def _report(self, activity: Activity) -> None:
        self.reported.append(activity)
        self.membership.activities[0] = ReportedActivity(activity, self.membership.gradients[0])

    def refresh_progress(self) -> None:
        pass

    def flush(self) -> None:
        self.flushed += 1
        self.flushed_after = self.absorbed

    def refresh_membership(self) -> None:
        self.refreshed += 1
        self._on_refresh(self)

    def is_flushed(self) -> bool:
        return self.unsent == 0


class Algorithm:
    """Absorbing one message lets the transport send one."""

    name = "some"
    required_ranks: frozenset[int] = frozenset()
    is_drained = True

    def __init__(self, endpoint: Endpoint) -> None:
        self.absorbed: list[int] = []
        self.released = False
        self._endpoint = endpoint

    def absorb(self, step: int) -> None:
        self.absorbed.append(step)
        self._endpoint.absorbed += 1
        self._endpoint.unsent = max(0, self._endpoint.unsent - 1)

    def finalize(self) -> Iterator[Any]:
        answers = iter([False, True])
        yield SimpleNamespace(test=lambda: next(answers))
        self.released = True


def _parts(endpoint: Endpoint) -> tuple[Any, Any, Waiter]:
    algorithm: Any = Algorithm(endpoint)
    transport: Any = endpoint
    return transport, algorithm, Waiter(transport, algorithm, stall_timeout=30)


def test_a_wait_ends_when_it_is_done_and_its_time_is_counted() -> None:
    endpoint = Endpoint()
    _, _, waiter = _parts(endpoint)
    answers = iter([False, False, True])
    waiter.wait(lambda: next(answers))
    assert next(answers, None) is None
    assert waiter.wait_seconds > 0
    waiter.wait(lambda: True)
    assert endpoint.refreshed == 0


@pytest.mark.parametrize("status", [FAILED, RUNNING])
def test_a_long_wait_ends_when_a_rank_that_is_needed_is_lost(status: int) -> None:
    endpoint = Endpoint()
    _, algorithm, waiter = _parts(endpoint)
    if status == FAILED:
        endpoint.membership.status[1] = FAILED
    else:
        endpoint.membership.dead.add(1)
        waiter.check_peers()  # it can do without
        algorithm.required_ranks = frozenset({1, 2})
    words = "rank 1 has failed" if status == FAILED else "rank 1 is gone, and some needs it"
    with pytest.raises(PeerLost, match=words) as raised:
        waiter.wait(lambda: False)
    assert raised.value.exit_code == (9 if status == FAILED else 4)


def test_peers_are_checked_no_more_often_than_they_must(clock: Clock) -> None:
    endpoint = Endpoint()
    _, _, waiter = _parts(endpoint)
    checks = []
    for _ in range(30):
        clock.sleep(PEER_CHECK_SECONDS / 10)
        waiter.check_peers_if_due()
        checks.append(endpoint.refreshed)
    assert checks[8] == 0
    assert checks[-1] == 3
    endpoint.membership.reads_in_steps = True
    _, _, waiter = _parts(endpoint)
    for _ in range(50):
        clock.sleep(PEER_CHECK_SECONDS / 10)
        waiter.check_peers_if_due()
    assert endpoint.refreshed == 4, "a step has read the others already"
    endpoint.membership.news[0] = 1
    waiter.check_peers_if_due()
    assert endpoint.refreshed == 5, "at once, when one has reported something"


def test_a_long_wait_checks_the_peers_and_yields_the_core_for_half_a_millisecond_at_most(
    clock: Clock,
) -> None:
    endpoint = Endpoint()
    _, _, waiter = _parts(endpoint)
    calls: list[float] = []

    def is_done() -> bool:
        calls.append(clock.now)
        return clock.now > 101

    waiter.wait(is_done)
    pauses = [after - before for before, after in pairwise(calls)]
    assert pauses[0] < 1e-5 < max(pauses) < 6e-4
    assert endpoint.refreshed > 1000
    assert waiter.wait_seconds == pytest.approx(1, abs=0.01)


def test_a_wait_without_progress_ends_with_the_rank_that_is_waited_for(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1 waits itself, rank 2 is in its own code: nothing ever comes."""

    def progress(endpoint: Endpoint) -> None:
        membership = endpoint.membership
        if clock.now < 125:
            membership.gradients[2] = 7 + int(clock.now)
        elif clock.now > 126:
            membership.activities[1] = ReportedActivity(Activity.SHADOWING, 6)

    endpoint = Endpoint(progress)
    _, _, waiter = _parts(endpoint)
    place = "rank 2 is in the program's own code after its step 131"
    with pytest.raises(
        PeerLost, match=f"^rank 0 waits in its step 5 .* for 30 s: {place}; .*stall_"
    ):
        waiter.wait(lambda: False)
    assert clock.now == pytest.approx(100 + 26 + 30, abs=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"rank 0 waits in its step 5 and has seen no progress for 10 s: {place}"
    ]
    assert endpoint.reported == [Activity.STEP, Activity.OWN_CODE]
    waiter.poll_until(lambda: True)
    assert len(endpoint.reported) == 2


def test_a_wait_in_which_this_rank_was_suspended_does_not_count(clock: Clock) -> None:
    endpoint = Endpoint()
    _, _, waiter = _parts(endpoint)
    times = iter([100.0 + 1000 * moment for moment in range(1, 30)])

    def is_done() -> bool:
        clock.now = next(times, 0.0) or clock.now + 1
        return clock.now > 30_020

    with pytest.raises(PeerLost, match="rank 1 .* rank 2"):
        waiter.wait(is_done)
    assert clock.now > 29_100, "29 suspensions of 1000 s do not make 30 s"


def test_where_all_wait_all_are_named() -> None:
    endpoint = Endpoint()
    _, _, waiter = _parts(endpoint)
    endpoint.membership.activities = [
        ReportedActivity(Activity.COLLECTIVE, 5),
        ReportedActivity(Activity.STEP, 6),
        ReportedActivity(Activity.CLOSING, 9),
    ]
    message = (
        r"call \(average, paused\) after its step 5 and .*: "
        "rank 1 waits in its step 6, rank 2 waits in close after its step 9;"
    )
    with pytest.raises(PeerLost, match=message):
        waiter.wait(lambda: False)
    assert endpoint.reported == [], "it had said already what it does"


def test_a_poll_ends_by_itself() -> None:
    _, _, waiter = _parts(Endpoint())
    assert waiter.wait_seconds == 0
    calls: list[None] = []
    waiter.poll(lambda: calls.append(None))
    assert len(calls) > 1
    calls.clear()
    waiter.poll(lambda: calls.append(None) or True)  # type: ignore[func-returns-value]
    assert len(calls) == 1


@pytest.mark.parametrize("call", ["wait", "poll_until", "poll"])
def test_what_is_given_away_reaches_the_others_before_each_pause_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, call: str
) -> None:
    endpoint = Endpoint()
    _, _, waiter = _parts(endpoint)
    answers = iter([False, False, True])
    flushed: list[int] = []

    def is_done() -> bool:
        endpoint.flushed = 0  # something is given away
        return next(answers)

    monkeypatch.setattr(clock, "sleep", lambda seconds: flushed.append(endpoint.flushed))
    getattr(waiter, call)(is_done)
    assert flushed == [1, 1]
    if call != "poll":  # its caller goes on in the same step
        assert endpoint.flushed == 1


def test_draining_sends_all_then_absorbs_until_the_others_have_stopped() -> None:
    def stop(endpoint: Endpoint) -> None:
        assert endpoint.membership.status[0] == FINISHED
        if endpoint.refreshed == 3:
            endpoint.membership.status[1] = FINISHED
        if endpoint.refreshed == 5:
            endpoint.membership.dead.add(2)  # is not waited for

    endpoint = Endpoint(stop)
    endpoint.unsent = 2
    transport, algorithm, waiter = _parts(endpoint)
    drain(transport, algorithm, waiter, 7)
    assert algorithm.released
    assert endpoint.refreshed == 5
    assert algorithm.absorbed == [7] * (2 + 5 + 1)  # the last one after all have stopped
    assert endpoint.flushed_after == 2 + 5 + 1


def test_draining_goes_on_until_the_algorithm_is_drained() -> None:
    endpoint = Endpoint()
    endpoint.membership.status[1:] = [FINISHED, FINISHED]
    transport, algorithm, waiter = _parts(endpoint)
    algorithm.is_drained = False

    def arrive(endpoint: Endpoint) -> None:
        algorithm.is_drained = endpoint.refreshed == 4

    endpoint._on_refresh = arrive
    drain(transport, algorithm, waiter, 7)
    assert endpoint.refreshed == 4


def test_a_rank_whose_last_update_was_not_finite_fails_before_others_absorb() -> None:
    """On a device it is known a step later, and after the last step there is none."""
    endpoint = Endpoint()

    def refuse() -> None:
        raise Diverged("rank 0, step 7")

    local: Any = SimpleNamespace(require_finite_updates=refuse)
    never: Any = None
    with pytest.raises(Diverged):
        leave(endpoint, never, never, SimpleNamespace(in_lockstep=False), local)  # type: ignore[arg-type]
    assert endpoint.membership.status[0] == FAILED and not endpoint.reported
