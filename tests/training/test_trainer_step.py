"""Steps of the trainer on a device: the losses of the host, and a host that does not wait."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd import config
from mpi_dasgd.errors import Diverged
from mpi_dasgd.storage.runfile import rank_path, read_run_file
from mpi_dasgd.storage.schema import TrainRow
from mpi_dasgd.training.finite_check import LateFiniteCheck
from mpi_dasgd.training.trainer_step import DeviceStep, HostStep, TrainerStep
from mpi_dasgd.training.workload import build_workload
from tests.support.late_device import LateDevice
from tests.support.late_stream import LateStream
from tests.support.mpi_ranks import ROOT, run_ranks
from tests.support.rank_pool import run_pooled

PROGRAM = ROOT / "tests" / "programs" / "late_steps.py"
BASE = ["task.name=breast_cancer", "task.model=logistic", "task.batch_size=8"]


class Steps:
    """Steps of one rank that exchanges nothing, and their rows."""

    def __init__(self, stream: LateStream | None, *overrides: str) -> None:
        settings = config.load(None, [*BASE, *overrides])
        self.workload = build_workload(settings, 0, 1, workers=range(1))
        self.local = SimpleNamespace(local_step=0, require_finite_updates=lambda: None)
        self.training: Any = SimpleNamespace(
            local=self.local, rank=0, config=settings, step=self._step, exchange_seconds=0.0,
            wait_seconds=0.0,
        )  # fmt: skip
        self.rows: list[TrainRow] = []
        recorder: Any = SimpleNamespace(
            record_step=lambda loss, **_: self.rows.append(self._row(loss)),
            describe_step=lambda wait_seconds: self._row(0.0),
            append_step=self.rows.append,
        )
        self.step: TrainerStep = (
            HostStep(self.training, self.workload, recorder)
            if stream is None
            else DeviceStep(self.training, self.workload, recorder, stream)
        )

    def _step(self, samples: int) -> None:
        self.workload.optimizer.step()
        self.local.local_step += 1

    def _row(self, loss: float) -> TrainRow:
        step = self.local.local_step
        return TrainRow(
            step=step, time_s=0.0, samples=8 * step, total_samples=8 * step, loss=loss,
            learning_rate=0.5, compute_s=0.0, exchange_s=0.0, wait_s=0.0, delay=0,
            delay_factor=1.0,
        )  # fmt: skip

    def make(self, count: int) -> list[tuple[int, float]]:
        """Make steps; return number and loss of those that are recorded."""
        for _ in range(count):
            self.step.make()
        self.step.flush()
        return [(row.step, row.loss) for row in self.rows]


@pytest.mark.parametrize("lag", [0, 3, None])
def test_steps_on_a_device_have_the_losses_of_the_host(lag: int | None) -> None:
    assert Steps(LateStream(lag)).make(20) == Steps(None).make(20)


@pytest.mark.parametrize("stream", [None, LateStream()])
def test_a_loss_that_is_not_finite_ends_the_training(stream: LateStream | None) -> None:
    steps = Steps(stream, "optimizer.lr=1e38")
    with pytest.raises(
        Diverged, match=r"loss of rank 0 became .* smaller optimizer.lr than 1e\+38"
    ):
        steps.make(20)
    assert steps.rows and all(np.isfinite(row.loss) for row in steps.rows)


def test_a_model_that_is_not_finite_is_in_no_checkpoint() -> None:
    """On the host its step would have refused it; a device tells of the last step when asked."""
    steps = Steps(LateStream())
    vector = torch.ones(4)
    device = LateDevice((0.01, 0.01))
    check = LateFiniteCheck(vector, device)

    def require_finite_updates() -> None:
        if (step := check.failed_step(wait=True)) is not None:
            raise Diverged(f"step {step}")

    steps.local.require_finite_updates = require_finite_updates
    assert len(steps.make(2)) == 2
    vector[1] = math.nan
    check.begin(2)
    with pytest.raises(Diverged, match="step 2"):
        steps.step.flush()
    device.close()


SLOW = ["straggler.distribution=constant", "straggler.ranks=[0]", "straggler.factor=3.5"]


def test_a_rank_that_works_more_stays_on_the_stream() -> None:
    stream = LateStream()
    steps = Steps(stream, *SLOW, "straggler.mode=busy")
    repeats = []
    queue = steps.workload.queue_gradient

    def gradient(*args: Any) -> Any:
        stream.clock += 0.25
        repeats.append(steps.local.local_step)
        return queue(*args)

    object.__setattr__(steps.workload, "queue_gradient", gradient)
    steps.make(5)
    # Nothing is known of the first step, which loads kernels; then it is the step before.
    assert [repeats.count(step) for step in range(5)] == [1, 1, 3, 3, 3]
    assert stream.busy == [0.125] * 3, "half a gradient more"
    assert [row.compute_s for row in steps.rows] == [0.25] * 5, "slowness counts nowhere"


def test_a_rank_sleeps_when_its_gradient_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep while the device computes, it would be no slower."""
    stream = LateStream()
    slept: list[tuple[float, int]] = []
    monkeypatch.setattr(
        "mpi_dasgd.straggler.time.sleep",
        lambda seconds: slept.append((seconds, stream.asked - stream.passed)),
    )
    steps = Steps(stream, *SLOW)
    queue = steps.workload.queue_gradient

    def gradient(*args: Any) -> Any:
        stream.clock += 0.5
        return queue(*args)

    object.__setattr__(steps.workload, "queue_gradient", gradient)
    steps.make(4)
    assert slept == [(1.25, 0)] * 2


@pytest.mark.mpi
def test_a_run_on_a_late_stream_is_that_of_the_host(tmp_path: Path) -> None:
    """With evaluations and checkpoints in its midst, each of which is as late as the host's."""
    run_pooled(
        2, PROGRAM, str(tmp_path), "host,late,exchange", "algorithm.name=alone",
        "schedule.name=constant", "schedule.warmup=0", "budget.epochs=2", "evaluation.count=3",
        "checkpoint.count=2", timeout=120,
    )  # fmt: skip
    for rank in range(2):
        host, late = (read_run_file(rank_path(tmp_path / name, rank)) for name in ("host", "late"))
        assert host.status == late.status == "finished"
        ours, theirs = late.tables["train"], host.tables["train"]
        common = min(len(ours["step"]), len(theirs["step"]))  # the budget is that of all ranks
        for column in ("step", "samples", "loss"):
            np.testing.assert_array_equal(ours[column][:common], theirs[column][:common])
        assert ours["step"].tolist() == list(range(1, int(late.counters["steps"]) + 1))
        assert common > 10
        assert (np.diff(ours["time_s"]) >= 0).all()
        assert (ours["compute_s"] >= 0).all() and (ours["exchange_s"] >= 0).all()
        both = read_run_file(rank_path(tmp_path / "exchange", rank))
        assert both.status == "finished"
        steps = both.tables["train"]["step"].tolist()
        assert steps == list(range(1, int(both.counters["steps"]) + 1))
        exchanges = both.tables["exchange"]
        assert len(exchanges["step"]) > 10 and (np.diff(exchanges["time_s"]) >= 0).all()


@pytest.mark.mpi
def test_a_run_that_diverges_on_a_late_stream_keeps_its_record(tmp_path: Path) -> None:
    done = run_ranks(
        2, PROGRAM, str(tmp_path), "late", "optimizer.lr=1e30", "run.check_finite=false",
        timeout=120, check=False,
    )  # fmt: skip
    assert done.codes == [3, 3], done.report()
    assert "which was seen a step later" in done.stderr, done.report()
    records = [read_run_file(rank_path(tmp_path / "late", rank)) for rank in range(2)]
    (failed,) = [record for record in records if record.status == "failed"][:1]
    losses = failed.tables["train"]["loss"]
    assert len(losses) == failed.counters["steps"] - 1 and np.isfinite(losses).all()
