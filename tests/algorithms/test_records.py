"""Ages, partners and skips of exchange records."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from mpi_dasgd import config
from mpi_dasgd.algorithms.records import (
    ABSORBED,
    INITIATED,
    SKIPPED,
    ExchangeRecord,
    ExchangeRecorder,
)
from mpi_dasgd.codecs import ExchangeOutcome, Header
from mpi_dasgd.errors import DeviceFailed
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.storage.record_ring import RecordRing
from tests.support.virtual_ranks import JOB


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


NATIVE_ROW = (9, 4.5, 3, ABSORBED, 7, 2, 0.5, 64, 1, 1.5, 2, -1)


def test_rows_of_native_code_reach_the_function_between_the_records_of_python(
    recorder: Any,
) -> None:
    _, records, exchange_records = recorder
    exchange_records.skipped(8)
    exchange_records.ring.append(*NATIVE_ROW)
    exchange_records.ring.append(*NATIVE_ROW)
    exchange_records.deliver()
    exchange_records.deliver()
    exchange_records.skipped(10)
    native = ExchangeRecord(9, 3, ABSORBED, 7, 0.5, 64, 1, 1.5, 2, -1)
    assert records[1:3] == [native, native]
    assert [record.step for record in records] == [8, 9, 9, 10]


def test_rows_of_native_code_stay_in_the_ring_that_the_records_go_to() -> None:
    endpoint: Any = SimpleNamespace(time_ns=lambda: 0, counters=SimpleNamespace(skipped=0))
    ring = RecordRing("exchange", 8)
    exchange_records = ExchangeRecorder(endpoint, ring)
    exchange_records.skipped(8)
    exchange_records.ring.append(*NATIVE_ROW)
    exchange_records.deliver()
    exchange_records.message(ABSORBED, 10, HEADER)
    assert exchange_records.ring is ring
    assert ring.take()["step"].tolist() == [8, 9, 10]


def test_rows_that_nobody_wants_make_room_for_others() -> None:
    endpoint: Any = SimpleNamespace(time_ns=lambda: 0, counters=SimpleNamespace(skipped=0))
    exchange_records = ExchangeRecorder(endpoint, None)
    exchange_records.skipped(8)
    assert endpoint.counters.skipped == 1
    exchange_records.ring.append(*NATIVE_ROW)
    exchange_records.deliver()
    assert len(exchange_records.ring.take()) == 0


class _Late:
    """An outcome that is known once `known` is set."""

    def __init__(self, distance: float, log: list[float]) -> None:
        self.distance, self.log, self.known, self.fails = distance, log, False, False

    @property
    def is_ready(self) -> bool:
        return self.known

    def value(self) -> ExchangeOutcome:
        if self.fails:
            raise DeviceFailed("the device")
        if not self.known:
            self.log.append(self.distance)  # waited
        return ExchangeOutcome(self.distance, 1)


def _late_exchanges(exchange_records: ExchangeRecorder, log: list[float]) -> list[_Late]:
    """Exchanges 1 to 3, whose outcomes are late, with a skip and a received delta between."""
    outcomes = [_Late(float(i), log) for i in range(1, 4)]
    for i, outcome in enumerate(outcomes):
        exchange_records.message(INITIATED, i + 1, HEADER, outcome=outcome)
        if i == 0:
            exchange_records.skipped(10, failed_attempts=4)
        if i == 1:
            exchange_records.message(ABSORBED, 11, HEADER)
    return outcomes


def test_late_outcomes_are_recorded_in_the_order_of_the_exchanges(recorder: Any) -> None:
    endpoint, records, exchange_records = recorder
    log: list[float] = []
    first, second, third = _late_exchanges(exchange_records, log)
    assert not records and endpoint.counters.skipped == 1
    endpoint.time_ns = lambda: 6_500_000_000
    second.known = True
    exchange_records.message(ABSORBED, 12, HEADER)
    assert not records, "the first is not known"
    first.known = True
    exchange_records.message(ABSORBED, 13, HEADER)
    assert [record.step for record in records] == [1, 10, 2, 11]
    assert records[0] == ExchangeRecord(1, 3, INITIATED, 7, 3.0, 0, 0, 1.0, 1, late_s=1.5)
    assert records[1][:7] == (10, -1, SKIPPED, -1, 0.0, 0, 4) and records[1].late_s == 1.5
    assert records[2].distance == 2.0
    third.known = True
    exchange_records.skipped(14)
    assert [record.step for record in records] == [1, 10, 2, 11, 3, 12, 13, 14]
    assert not log, "nothing has waited"
    exchange_records.message(ABSORBED, 15, HEADER)
    assert records[-1].step == 15 and records[-1].late_s == 0.0, "at once, as nothing is late"


def test_flush_waits_for_late_outcomes(recorder: Any) -> None:
    _, records, exchange_records = recorder
    log: list[float] = []
    _late_exchanges(exchange_records, log)
    exchange_records.flush()
    assert [(record.step, record.rejected) for record in records] == [
        (1, 1), (10, 0), (2, 1), (11, 0), (3, 1),
    ]  # fmt: skip
    assert log == [1.0, 2.0, 3.0]
    exchange_records.flush()
    assert len(records) == 5


def test_a_device_that_fails_leaves_no_record_behind(recorder: Any) -> None:
    _, records, exchange_records = recorder
    _, second, third = _late_exchanges(exchange_records, [])
    second.fails = third.fails = True
    with pytest.raises(DeviceFailed):
        exchange_records.flush()
    assert [record.step for record in records] == [1, 10, 2, 11, 3]
    assert records[0].distance == 1.0 and math.isnan(records[2].distance)
    exchange_records.flush()


class _LateCodec:
    """Makes the outcomes of a codec known only some exchanges later."""

    def __init__(self, codec: Any) -> None:
        self._average_pair, self._outcomes = codec.average_pair, []  # type: ignore[var-annotated]

    def average_pair(self, x: Any, buffers: Any) -> Any:
        """Exchange; the outcome before the last four is known then."""
        outcome = _Late(math.nan, [])
        measured = self._average_pair(x, buffers)
        outcome.value = lambda: measured  # type: ignore[method-assign]
        self._outcomes.append(outcome)
        for earlier in self._outcomes[:-4]:
            earlier.known = True
        return outcome


@pytest.mark.parametrize("algorithm", ["adpsgd", "swarm"])
def test_an_algorithm_on_a_late_device_has_the_same_records(algorithm: str) -> None:
    def run(is_late: bool) -> list[list[ExchangeRecord]]:
        settings = [
            f"algorithm.name={algorithm}", "codec.name=lattice8", "simulation.dtype=float32",
            "simulation.dimension=1100", "simulation.ranks=4", "simulation.latency=0.2",
            "budget.samples=400",
        ]  # fmt: skip
        simulator = Simulator(config.load(JOB, settings))
        records: list[list[ExchangeRecord]] = [[] for _ in simulator.algorithms]
        for rank, own in zip(simulator.algorithms, records, strict=True):
            inner = rank.records.record
            rank.records.record = lambda r, own=own, inner=inner: (own.append(r), inner(r))  # type: ignore[misc]
            if is_late:
                rank.codec.average_pair = _LateCodec(rank.codec).average_pair  # type: ignore[method-assign]
        simulator.run()
        for rank in simulator.algorithms:
            rank.settle()
        return records

    punctual, late = run(is_late=False), run(is_late=True)
    assert sum(map(len, punctual)) > 50
    lateness = [record.late_s for rank in late for record in rank]
    assert max(lateness) > 0 and not any(record.late_s for rank in punctual for record in rank)
    for expected, found in zip(punctual, late, strict=True):
        assert repr(expected) == repr([record._replace(late_s=0.0) for record in found])
