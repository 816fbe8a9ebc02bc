"""Records of exchanges: the rows of a run's results on averages, skips and received gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from mpi_dasgd.codecs import ExchangeOutcome, Header, Outcome
from mpi_dasgd.storage.record_ring import RecordRing
from mpi_dasgd.storage.schema import ABSORBED, APPLIED, INITIATED, SKIPPED, UNKNOWN_AGE
from mpi_dasgd.transport.endpoint import Endpoint

__all__ = [
    "ABSORBED",
    "APPLIED",
    "INITIATED",
    "SKIPPED",
    "ExchangeRecord",
    "ExchangeRecorder",
    "RecordSink",
]

_NOT_MEASURED = ExchangeOutcome()
_NATIVE_ROWS = 128  # more than an exchange can have: a full inbox, and itself


class ExchangeRecord(NamedTuple):
    """Record of an exchange as one of its sides sees it, or of a gradient from another rank.

    Attributes:
        step: own local step.
        partner: the other rank, -1 if none was found.
        kind: INITIATED, ABSORBED, SKIPPED or APPLIED (a gradient).
        partner_step: local step at which the partner made its model or delta, -1 without a partner;
            algorithms that record gradients say in their module what it is.
        age_s: seconds since then.
        nbytes: bytes that this rank moved.
        retries: candidates that were claimed by others, or whose inbox was full, before a partner
            was found.
        distance: ||x_i - x_j||_2 before the average; NaN if it was not measured.
        rejected: buckets of the partner's publication that could not be decoded.
        set_staleness: size of the symmetric difference of the two ranks' sets of gradients, -1 if
            it is unknown.
        late_s: seconds between the exchange and this record, which waits for the outcome of a GPU.
    """

    step: int
    partner: int
    kind: int
    partner_step: int
    age_s: float
    nbytes: int
    retries: int
    distance: float = float("nan")
    rejected: int = 0
    set_staleness: int = -1
    late_s: float = 0.0


RecordSink = Callable[[ExchangeRecord], None] | RecordRing | None
"""Where records go: to a function, as rows to a ring, or nowhere."""


class ExchangeRecorder:
    """Writer of one rank's exchange records, in the order of the exchanges.

    An exchange on a GPU is recorded when its outcome is known: at a later exchange, or by `flush`.
    Native code that makes exchanges writes their rows to `ring`; who calls it calls `deliver`.

    Args:
        endpoint: transport of the rank, whose clock gives ages and whose counters count skips.
        sink: gets every record.

    Attributes:
        record: called with every record that is not written to a ring at once; tests replace it to
            observe the records.
    """

    def __init__(self, endpoint: Endpoint, sink: RecordSink) -> None:
        self._endpoint = endpoint
        self._rows = sink if isinstance(sink, RecordRing) else None
        self.record: Callable[[ExchangeRecord], None] = (
            self._write if isinstance(sink, RecordRing) else sink or _ignore
        )
        self._late: deque[tuple[ExchangeRecord, Outcome, int]] = deque()

    @cached_property
    def ring(self) -> RecordRing:
        """Ring to which native code writes the rows of exchanges."""
        return self._rows or RecordRing("exchange", _NATIVE_ROWS)

    def deliver(self) -> None:
        """Hand on the rows that native code has written, where they go to a function."""
        if self._rows is not None:
            return
        if self.record is _ignore:
            self.ring.discard()
            return
        for row in self.ring.take().tolist():
            step, _, partner, kind, partner_step, _, *rest = row
            self.record(ExchangeRecord(step, partner, kind, partner_step, *rest))

    def skipped(self, step: int, failed_attempts: int = 0) -> None:
        """Record and count that no partner was found at `step`."""
        self._endpoint.counters.skipped += 1
        record = ExchangeRecord(step, -1, SKIPPED, -1, 0.0, 0, failed_attempts)
        if self._late:
            self._defer(record, _NOT_MEASURED, self._endpoint.time_ns())
        else:
            self.record(record)

    def message(
        self,
        kind: int,
        step: int,
        header: Header,
        *,
        nbytes: int = 0,
        failed_attempts: int = 0,
        outcome: Outcome = _NOT_MEASURED,
        now_ns: int | None = None,
    ) -> None:
        """Record that the message with `header` was used at `step`; see `exchange`."""
        self.exchange(
            kind,
            step,
            partner=header.rank,
            partner_step=header.step,
            sent_ns=header.time_ns,
            nbytes=nbytes,
            failed_attempts=failed_attempts,
            outcome=outcome,
            now_ns=now_ns,
        )

    def exchange(
        self,
        kind: int,
        step: int,
        *,
        partner: int,
        partner_step: int,
        sent_ns: int,
        nbytes: int = 0,
        failed_attempts: int = 0,
        outcome: Outcome = _NOT_MEASURED,
        set_staleness: int = -1,
        now_ns: int | None = None,
    ) -> None:
        """Record an exchange, with its age.

        Args:
            kind, step, partner, partner_step, nbytes, set_staleness: as in `ExchangeRecord`.
            sent_ns: time at which the partner's model, delta or work item was made, nanoseconds.
            failed_attempts: candidates that failed before this partner.
            outcome: what the codec measured.
            now_ns: time of the exchange, nanoseconds; None for the present.
        """
        now = self._endpoint.time_ns() if now_ns is None else now_ns
        age = (now - sent_ns) * 1e-9
        measured = outcome if isinstance(outcome, ExchangeOutcome) else _NOT_MEASURED
        is_late = self._late or measured is not outcome
        if self._rows is not None and not is_late:
            self._rows.append(
                step,
                self._rows.elapsed(),
                partner,
                kind,
                partner_step,
                step - partner_step,
                age,
                nbytes,
                failed_attempts,
                measured.distance,
                measured.rejected,
                set_staleness,
            )
            return
        record = ExchangeRecord(
            step,
            partner,
            kind,
            partner_step,
            age,
            nbytes,
            failed_attempts,
            measured.distance,
            measured.rejected,
            set_staleness,
        )
        if is_late:
            self._defer(record, outcome, now)
        else:
            self.record(record)

    def flush(self) -> None:
        """Wait for the outcomes that are late, and record their exchanges.

        Raises:
            DeviceFailed: the device has failed; what it has not finished is recorded as not
                measured.
        """
        try:
            while self._late:
                self._record_first(self._late[0][1].value())
        finally:
            while self._late:
                self._record_first(_NOT_MEASURED)

    def _write(self, record: ExchangeRecord) -> None:
        """Write a record to the ring, at the time when the exchange was made."""
        assert self._rows is not None
        self._rows.append(
            record.step,
            self._rows.elapsed() - record.late_s,
            record.partner,
            record.kind,
            record.partner_step,
            record.step - record.partner_step if record.partner >= 0 else UNKNOWN_AGE,
            *record[4:10],
        )

    def _defer(self, record: ExchangeRecord, outcome: Outcome, now_ns: int) -> None:
        """Record all whose outcomes are known by now, and this one once it is its turn."""
        late = self._late
        late.append((record, outcome, now_ns))
        while late and late[0][1].is_ready:
            self._record_first(late[0][1].value())

    def _record_first(self, measured: ExchangeOutcome) -> None:
        record, _, exchanged_ns = self._late.popleft()
        self.record(
            record._replace(
                distance=measured.distance,
                rejected=measured.rejected,
                late_s=(self._endpoint.time_ns() - exchanged_ns) * 1e-9,
            )
        )


def _ignore(_: ExchangeRecord) -> None:
    """Take a record that nobody wants."""
