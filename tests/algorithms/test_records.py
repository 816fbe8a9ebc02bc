"""Ages, partners and skips of exchange records."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_dasgd.algorithms.records import (
    ABSORBED,
    INITIATED,
    SKIPPED,
    ExchangeRecord,
    ExchangeRecorder,
)
from mpi_dasgd.codecs import ExchangeOutcome, Header


@pytest.fixture
def recorder() -> tuple[Any, list[ExchangeRecord], ExchangeRecorder]:
    records: list[ExchangeRecord] = []
    endpoint = SimpleNamespace(time_ns=lambda: 5_000_000_000, counters=SimpleNamespace(skipped=0))
    return endpoint, records, ExchangeRecorder(endpoint, records.append)  # type: ignore[arg-type]


HEADER = Header(
    magic=0,
    version=1,
    codec=0,
    rank=3,
    step=7,
    time_ns=2_000_000_000,
    elements=8,
    nbytes=128,
    seed=0,
)


def test_a_message_gives_partner_step_and_age(recorder: Any) -> None:
    _, records, exchange_records = recorder
    exchange_records.message(ABSORBED, 9, HEADER)
    (record,) = records
    assert record[:7] == (9, 3, ABSORBED, 7, 3.0, 0, 0)
    assert math.isnan(record.distance)


def test_the_time_of_the_exchange_can_be_given_and_the_outcome_is_kept(recorder: Any) -> None:
    _, records, exchange_records = recorder
    outcome = ExchangeOutcome(distance=0.5, rejected=2)
    exchange_records.message(
        INITIATED, 9, HEADER, nbytes=256, failed_attempts=1, outcome=outcome, now_ns=2_500_000_000
    )
    assert records == [ExchangeRecord(9, 3, INITIATED, 7, 0.5, 256, 1, 0.5, 2)]


def test_a_skip_is_recorded_and_counted(recorder: Any) -> None:
    endpoint, records, exchange_records = recorder
    exchange_records.skipped(4, failed_attempts=2)
    assert records[0][:7] == (4, -1, SKIPPED, -1, 0.0, 0, 2)
    assert endpoint.counters.skipped == 1
