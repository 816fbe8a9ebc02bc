"""What others see of a step: what was given away, and when its gradient was there."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from mpi_dasgd.training.closure import Closure
from mpi_dasgd.training.stepper import Stepper
from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled


@pytest.mark.mpi
def test_nothing_is_left_unflushed_by_any_call_and_any_wait() -> None:
    """Fails, or never ends, without the flush of any one of them."""
    run_pooled(2, ROOT / "tests" / "programs" / "withheld.py")


@pytest.mark.parametrize("evaluations", [1, 3])
def test_a_step_begins_when_its_gradient_is_there(evaluations: int) -> None:
    """Before it claims, the host waits for a gradient; that of a closure comes in the update."""
    done: list[str] = []
    closure = Closure(lambda: done.append("gradient"), "adpsgd")

    def update(_: object) -> list[Any]:
        for _ in range(evaluations):
            closure()
        done.append("update")
        return []

    parts = mock.MagicMock()
    parts.algorithm.capabilities.one_model = False
    parts.algorithm.step = update
    parts.endpoint.run_ahead.begin_step = lambda: done.append("mark")
    stepper = Stepper(parts, *(mock.MagicMock() for _ in range(5)))
    stepper._shadow.open_step = stepper._pauses.open_call = None  # type: ignore[assignment]
    stepper._local.update_seconds = 0.0
    stepper.step(1, closure)
    assert done == ["gradient", "mark"] * evaluations + ["update"]

    done.clear()
    stepper.may_step = True
    parts.algorithm.step = lambda _: done.append("update") or []
    stepper.step(1, None)
    assert done == ["mark", "update"]
