"""The host waits for the beginning of a step before it claims, and no longer."""

from __future__ import annotations

from types import SimpleNamespace

from mpi_dasgd.device.host import HOST
from mpi_dasgd.device.run_ahead import RunAhead


class _Device:
    is_asynchronous = True

    def __init__(self) -> None:
        self.marked = 0
        self.waited: list[int] = []

    def mark(self) -> object:
        self.marked += 1
        number = self.marked
        return SimpleNamespace(wait=lambda: self.waited.append(number))


def test_waits_for_the_beginning_of_this_step():
    device = _Device()
    ahead = RunAhead(device)
    for step in (1, 2, 3):
        ahead.begin_step()
        ahead.catch_up()
        assert device.waited[-1] == step
    ahead.catch_up()  # a step may claim twice
    assert device.waited == [1, 2, 3]


def test_waits_for_the_step_before_if_it_may_be_ahead():
    device = _Device()
    ahead = RunAhead(device, 1)
    for _ in range(3):
        ahead.begin_step()
        ahead.catch_up()
    assert device.waited == [1, 2]


def test_the_host_needs_no_marks():
    ahead = RunAhead(HOST)
    ahead.begin_step()
    ahead.catch_up()
    assert not ahead._marks
