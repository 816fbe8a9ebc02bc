"""Figures of a step that a device computes later: read one step later, in order, none lost."""

from __future__ import annotations

import math

import pytest
import torch

from mpi_dasgd.errors import DeviceFailed, Diverged
from mpi_dasgd.storage.schema import TrainRow
from mpi_dasgd.training.late_rows import LateRows
from tests.support.late_stream import LateMark, LateStream

GRADIENT, UPDATE, EXCHANGE = 0.25, 0.0625, 0.125


def _row(step: int, wait_s: float = 0.0) -> TrainRow:
    return TrainRow(
        step=step, time_s=1.0, samples=step, total_samples=step, loss=math.nan, learning_rate=0.5,
        compute_s=math.nan, exchange_s=math.nan, wait_s=wait_s, delay=0, delay_factor=1.0,
    )  # fmt: skip


class Loop:
    """A training loop on a stream, with its rows."""

    def __init__(self, stream: LateStream) -> None:
        parameter = torch.nn.Parameter(torch.zeros(2))
        self.stream = stream
        self.optimizer = torch.optim.SGD([parameter], lr=0.5)
        self.appended: list[TrainRow] = []
        self.rows = LateRows(stream, self.optimizer, self.appended.append, rank=3, lr=0.5)
        self.steps = 0

    def gradient(self, loss: float, seconds: float = GRADIENT) -> None:
        """Queue forward and backward of the next step."""
        self.rows.begin()
        self.stream.clock += seconds
        self.rows.computed(torch.tensor(loss))

    def step(
        self, loss: float, *, updates: int = 1, wait_s: float = 0.0, slow: float = 0.0
    ) -> None:
        """Queue a whole step."""
        self.gradient(loss)
        if slow:
            self.stream.clock += slow
            self.rows.resume()
        for _ in range(updates):
            self._update()
        self.stream.clock += EXCHANGE
        self.steps += 1
        self.rows.end(_row(self.steps, wait_s))

    def _update(self) -> None:
        parameter = self.optimizer.param_groups[0]["params"][0]
        parameter.grad = torch.zeros(2)
        step, stream = self.optimizer.step, self.stream
        handle = self.optimizer.register_step_pre_hook(
            lambda *_: setattr(stream, "clock", stream.clock + UPDATE)
        )
        step()
        handle.remove()


def test_figures_come_one_step_later_and_none_is_lost() -> None:
    loop = Loop(LateStream())
    loop.step(2.0)
    assert not loop.appended and not loop.stream.waited, "nothing is read in its own step"
    loop.step(1.5)
    # The host waits for the gradient of the step before, with the next one queued behind it; the
    # mark behind the exchange of that step is not passed yet, and is not waited for.
    first_gradient, second_gradient = 1, 6
    assert loop.stream.waited == [first_gradient] and loop.stream.asked > second_gradient
    assert not loop.appended
    loop.step(1.25)
    assert loop.stream.waited == [first_gradient, second_gradient]
    assert [row.step for row in loop.appended] == [1]
    loop.rows.flush()
    assert [(row.step, row.loss) for row in loop.appended] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    loop.rows.flush()
    assert len(loop.appended) == 3


def test_a_device_that_is_done_is_not_waited_for() -> None:
    loop = Loop(LateStream(lag=0))
    for loss in (2.0, 1.0, 0.5):
        loop.step(loss)
    assert not loop.stream.waited
    assert [row.loss for row in loop.appended] == [2.0, 1.0]


@pytest.mark.parametrize("updates", [0, 1, 2])
def test_times_are_the_devices(updates: int) -> None:
    """Slowness counts nowhere, as on the host; waiting is the host's."""
    loop = Loop(LateStream())
    loop.step(1.0, updates=updates, wait_s=0.03125, slow=4.0)
    loop.rows.flush()
    (row,) = loop.appended
    assert row.compute_s == GRADIENT + updates * UPDATE
    assert row.exchange_s == EXCHANGE - 0.03125
    assert row.wait_s == 0.03125


def test_the_time_of_a_gradient_is_that_of_the_step_before() -> None:
    loop = Loop(LateStream())
    known = []
    for seconds in (8.0, 0.5, 0.25, 0.125):
        loop.gradient(1.0, seconds)
        known.append(loop.rows.gradient_seconds)
        loop.rows.end(_row(1))
    assert known == [0.0, 0.0, 0.5, 0.25], "the first step loads kernels"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_one_step_later(loss: float) -> None:
    loop = Loop(LateStream())
    loop.step(2.0)
    loop.step(loss)
    with pytest.raises(Diverged, match=rf"loss of rank 3 became {loss} at its step 2, .*than 0\.5"):
        loop.gradient(1.0)
    loop.rows.salvage()
    assert [(row.step, row.loss) for row in loop.appended] == [(1, 2.0)], "as on the host"


def test_the_last_loss_is_looked_at_too() -> None:
    loop = Loop(LateStream())
    loop.step(2.0)
    loop.step(math.nan)
    with pytest.raises(Diverged, match="at its step 2"):
        loop.rows.flush()
    assert [row.step for row in loop.appended] == [1]


def test_a_run_that_fails_keeps_the_steps_that_were_made() -> None:
    loop = Loop(LateStream())
    loop.step(2.0)
    loop.step(1.0)
    loop.gradient(0.5)  # and its exchange fails
    loop.rows.salvage()
    assert [row.step for row in loop.appended] == [1, 2]


def test_a_device_that_has_failed_does_not_hide_why_the_run_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(mark: LateMark) -> None:
        raise DeviceFailed("cuda:0: an illegal memory access was encountered")

    loop = Loop(LateStream())
    loop.step(2.0)
    monkeypatch.setattr(LateMark, "wait", fail)
    with pytest.raises(DeviceFailed):
        loop.rows.flush()
    loop.rows.salvage()
    assert not loop.appended
