"""What a rank records of its training."""

from __future__ import annotations

import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.storage.schema import APPLIED, INITIATED, SKIPPED, UNKNOWN_AGE, Row
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from mpi_dasgd.training.recorder import Recorder


class File:
    """Run file that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed: list[tuple[str, dict[str, float]]] = []

    def append(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)

    def close(self, status: str, counters: dict[str, float]) -> None:
        """Keep the end."""
        self.closed.append((status, counters))

    def last(self) -> dict[str, Any]:
        """Return the newest row by column."""
        return asdict(self.rows[-1])


@pytest.fixture
def file() -> File:
    """The run file."""
    return File()


@pytest.fixture
def training() -> SimpleNamespace:
    """A rank in the middle of its training."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    return SimpleNamespace(
        model=model, local=TorchLocalOptimizer(optimizer, FlatParameters(model)), rank=2,
        elapsed=4.0, samples=100, total_samples=400, progress=0.25, delay=3, delay_factor=0.5,
        computes_gradients=True, counters={"messages": 7},
        algorithm=SimpleNamespace(name="adpsgd"), codec=SimpleNamespace(counters={}),
    )  # fmt: skip


@pytest.fixture
def recorder(file: Any, training: Any) -> Recorder:
    """The recorder of both."""
    return Recorder(file, training)


def _exchange(
    step: int, partner_step: int, kind: int = INITIATED, partner: int = 1
) -> ExchangeRecord:
    return ExchangeRecord(step, partner, kind, partner_step, 0.5, 64, 2, 1.5, 3, 4)


def _step(recorder: Recorder, loss: float = 1.0) -> None:
    recorder.record_step(loss, compute_seconds=0.1, exchange_seconds=0.2, wait_seconds=0.3)


def test_a_step_fills_its_row(file: File, training: SimpleNamespace, recorder: Recorder) -> None:
    training.local.local_step = 9
    _step(recorder, 1.25)
    row = file.last()
    assert (row["step"], row["samples"], row["loss"]) == (9, 100, 1.25)
    assert row["total_samples"] == 400
    assert (row["compute_s"], row["exchange_s"], row["wait_s"]) == (0.1, 0.2, 0.3)
    assert (row["delay"], row["delay_factor"]) == (3, 0.5)


def test_the_recorded_learning_rate_is_the_schedules_though_a_server_applies_it(
    file: File, training: SimpleNamespace, recorder: Recorder
) -> None:
    def recorded() -> float:
        _step(recorder)
        return float(file.last()["learning_rate"])

    local = training.local
    local.lr_scale = 0.5
    assert recorded() == 0.1  # of a worker, whose optimizer makes no step
    training.model(torch.ones(1, 2)).sum().backward()
    local.apply(0.5)
    assert recorded() == local.lr == 0.05
    local.lr_scale = 0.1  # of a step without an update: the rate is the last one's
    assert recorded() == 0.05


def test_an_exchange_fills_its_row(file: File, recorder: Recorder) -> None:
    recorder.record_exchange(_exchange(10, 7))
    row = file.last()
    assert (row["step"], row["partner"], row["partner_step"], row["age_steps"]) == (10, 1, 7, 3)
    assert (row["age_s"], row["bytes"], row["retries"]) == (0.5, 64, 2)
    assert (row["distance"], row["rejected"]) == (1.5, 3)
    recorder.record_exchange(_exchange(10, -1, SKIPPED, partner=-1))
    assert file.last()["age_steps"] == UNKNOWN_AGE


def test_an_exchange_that_is_recorded_late_keeps_its_time(file: File, recorder: Recorder) -> None:
    recorder.record_exchange(_exchange(10, 7))
    assert file.last()["time_s"] == 4.0
    recorder.record_exchange(_exchange(10, 7)._replace(late_s=0.5))
    assert file.last()["time_s"] == 3.5


def test_the_progress_line_has_what_there_is_to_tell(
    training: SimpleNamespace, recorder: Recorder
) -> None:
    assert math.isnan(recorder.loss)
    assert recorder.progress_text() == "adpsgd  25 %  100 samples/s", "a GPU's loss comes later"
    _step(recorder, 0.75)
    assert recorder.progress_text() == "adpsgd  25 %  100 samples/s  loss 0.7500"
    recorder.record_exchange(_exchange(10, 8))
    recorder.record_exchange(_exchange(10, 6, APPLIED))
    recorder.record_exchange(_exchange(10, 12))  # a partner that is ahead counts as 0
    recorder.record_exchange(_exchange(10, -1, SKIPPED, partner=-1))  # not counted
    recorder.record_evaluation(1, (4.0, 100, 400), 0.5, 0.875)
    training.codec.counters = {"buckets_rejected": 1, "buckets_decoded": 199}
    training.computes_gradients = False
    assert recorder.progress_text() == (
        "adpsgd  25 %  100 samples/s  accuracy 87.5 % (rank 2)  staleness 2.0 steps, at most 4  "
        "0.5 % of buckets not decoded"
    )


def test_an_evaluation_fills_its_row(file: File, recorder: Recorder) -> None:
    recorder.record_evaluation(3, (4.0, 100, 400), 0.5, 0.875)
    assert list(file.last().values()) == [3, 0, 4.0, 100, 400, 0.5, 0.875]


def test_the_run_file_closes_with_counters(file: File, recorder: Recorder) -> None:
    recorder.close("finished")
    ((status, counters),) = file.closed
    assert status == "finished"
    expected = {"messages": 7, "steps": 0, "samples": 100, "wall_s": 4.0}
    assert {name: counters[name] for name in expected} == expected
    assert np.isfinite(counters["cpu_s"])
