"""What a rank records of its training."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.algorithms.records import ExchangeRecorder
from mpi_dasgd.codecs import ExchangeOutcome
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.storage.schema import APPLIED, INITIATED, ROWS, SKIPPED, TABLES, UNKNOWN_AGE, Row
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer
from mpi_dasgd.training.recorder import Recorder


class File:
    """Run file that keeps what it gets."""

    def __init__(self) -> None:
        self.rings = {table: RecordRing(table) for table in TABLES}
        self.closed: list[tuple[str, dict[str, float]]] = []

    def append(self, row: Row) -> None:
        """Keep a row."""
        ((table, columns),) = [(t, TABLES[t]) for t, cls in ROWS.items() if cls is type(row)]
        self.rings[table].append(*(getattr(row, column.name) for column in columns))

    def close(self, status: str, counters: dict[str, float]) -> None:
        """Keep the end."""
        self.closed.append((status, counters))

    def last(self, table: str = "train") -> dict[str, Any]:
        """Return the newest row of a table by column."""
        rows = self.rings[table].take()
        return dict(zip(rows.dtype.names, rows[-1].item(), strict=True))


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
        budget=SimpleNamespace(origin=time.monotonic() - 4.0, samples=100, total_samples=400),
        learning_rate=SimpleNamespace(delay=3, delay_factor=0.5),
        computes_gradients=True, counters={"messages": 7},
        algorithm=SimpleNamespace(name="adpsgd"), codec=SimpleNamespace(counters={}),
    )  # fmt: skip


@pytest.fixture
def recorder(file: Any, training: Any) -> Recorder:
    """The recorder of both."""
    return Recorder(file, training)


@pytest.fixture
def records(file: File) -> ExchangeRecorder:
    """What an algorithm records its exchanges with."""
    endpoint: Any = SimpleNamespace(counters=SimpleNamespace(skipped=0), time_ns=lambda: 0)
    file.rings["exchange"].origin = time.monotonic() - 4.0
    return ExchangeRecorder(endpoint, file.rings["exchange"])


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
    assert 4.0 <= row["time_s"] < 60.0
    row["time_s"] = 4.0
    assert row == {
        "step": 9, "time_s": 4.0, "samples": 100, "total_samples": 400, "loss": 1.25,
        "learning_rate": 0.2, "compute_s": 0.1, "exchange_s": 0.2, "wait_s": 0.3, "delay": 3,
        "delay_factor": 0.5,
    }  # fmt: skip
    recorder.append_step(recorder.describe_step(0.3))
    late = file.last()
    assert math.isnan(late["loss"] + late["compute_s"] + late["exchange_s"])
    assert late == {**row, **{name: late[name] for name in ("loss", "compute_s", "exchange_s")}}


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


def test_an_exchange_fills_its_row(file: File, records: ExchangeRecorder) -> None:
    records.exchange(
        INITIATED, 10, partner=1, partner_step=7, sent_ns=0, nbytes=64, failed_attempts=2,
        outcome=ExchangeOutcome(1.5, 3), set_staleness=4, now_ns=10**9,
    )  # fmt: skip
    row = file.last("exchange")
    assert 4.0 <= row.pop("time_s") < 60.0
    assert row == {
        "step": 10, "partner": 1, "kind": INITIATED, "partner_step": 7, "age_steps": 3,
        "age_s": 1.0, "bytes": 64, "retries": 2, "distance": 1.5, "rejected": 3,
        "set_staleness": 4,
    }  # fmt: skip
    records.record(_exchange(10, 7))
    row = file.last("exchange")
    assert (row["age_steps"], row["age_s"], row["bytes"], row["retries"]) == (3, 0.5, 64, 2)
    assert (row["distance"], row["rejected"], row["set_staleness"]) == (1.5, 3, 4)
    records.skipped(11, 3)
    row = file.last("exchange")
    assert (row["step"], row["partner"], row["kind"], row["retries"]) == (11, -1, SKIPPED, 3)
    assert (row["age_steps"], row["partner_step"]) == (UNKNOWN_AGE, -1)


def test_an_exchange_that_is_recorded_late_keeps_its_time(
    file: File, records: ExchangeRecorder
) -> None:
    records.record(_exchange(10, 7)._replace(late_s=1000.0))
    assert 4.0 - 1000.0 <= file.last("exchange")["time_s"] < 60.0 - 1000.0


def test_the_progress_line_has_what_there_is_to_tell(
    training: SimpleNamespace, recorder: Recorder, records: ExchangeRecorder
) -> None:
    assert math.isnan(recorder.loss)
    assert recorder.progress_text() == "adpsgd  25 %  100 samples/s", "a GPU's loss comes later"
    _step(recorder, 0.75)
    assert recorder.progress_text() == "adpsgd  25 %  100 samples/s  loss 0.7500"
    records.record(_exchange(10, 8))
    records.record(_exchange(10, 6, APPLIED))
    records.record(_exchange(10, 12))  # a partner that is ahead counts as 0
    records.record(_exchange(10, -1, SKIPPED, partner=-1))  # not counted
    recorder.record_evaluation(1, (4.0, 100, 400), 0.5, 0.875)
    training.codec.counters = {"buckets_rejected": 1, "buckets_decoded": 199}
    training.computes_gradients = False
    assert recorder.progress_text() == (
        "adpsgd  25 %  100 samples/s  accuracy 87.5 % (rank 2)  staleness 2.0 steps, at most 4  "
        "0.5 % of buckets not decoded"
    )


def test_the_progress_line_counts_exchanges_that_are_written_already(
    recorder: Recorder, file: File, records: ExchangeRecorder
) -> None:
    for step in range(10_000):  # more than a ring holds, and than the line averages
        records.record(_exchange(step, step - 7 if step == 5 else step - 2))
        if step == 3_000:
            file.rings["exchange"].take()
    assert recorder.progress_text().endswith("staleness 2.0 steps, at most 7")


def test_an_evaluation_fills_its_row(file: File, recorder: Recorder) -> None:
    recorder.record_evaluation(3, (4.0, 100, 400), 0.5, 0.875)
    assert list(file.last("evaluation").values()) == [3, 0, 4.0, 100, 400, 0.5, 0.875]


def test_the_run_file_closes_with_counters(file: File, recorder: Recorder) -> None:
    recorder.close("finished")
    ((status, counters),) = file.closed
    assert status == "finished"
    expected = {"messages": 7, "steps": 0, "samples": 100, "wall_s": 4.0}
    assert {name: counters[name] for name in expected} == expected
    assert np.isfinite(counters["cpu_s"])
