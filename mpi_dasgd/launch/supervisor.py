"""Supervision of a running job: waits for its end, and ends it when that is due."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from mpi_dasgd.launch.deadlock import Deadlock, find_deadlock
from mpi_dasgd.launch.outcome import Cause
from mpi_dasgd.launch.rank_status import Ranks

__all__ = ["Supervisor"]

# Seconds
_POLL_INTERVAL = 0.05
_STAGE_INTERVAL = 0.5  # between two looks at the stages of the ranks
_STACK_DUMP_GRACE = 1.0  # from the request for stacks to SIGKILL
_FAILURE_GRACE = 5.0  # from a rank's failure, or a deadlock, to SIGTERM for the others
_SIGNAL_GRACE = 10.0  # from a signal to SIGKILL
_LAUNCHER_GRACE = 5.0  # from the end of the ranks to SIGKILL for their launcher


class Supervisor:
    """Waits for a launcher, and ends its job on a signal, a time-out, a failure or a loss.

    Args:
        process: the launcher, leader of its process group.
        ranks: the ranks that it starts.
        signals: signals received by this process so far; the owner appends to it.
        timeout: seconds from now until the job is ended; None: no limit.

    Attributes:
        ended_by: what ended the job; None if it ended by itself.
        deadlock: the deadlock that was ended, if one was.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ranks: Ranks,
        signals: Sequence[signal.Signals],
        timeout: float | None,
    ) -> None:
        self.ended_by: Cause | None = None
        self._process = process
        self._ranks = ranks
        self._signals = signals
        self._handled_signals = 0
        self._deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        self.deadlock: Deadlock | None = None
        self._suspected: Deadlock | None = None
        self._suspected_since = self._last_look = 0.0
        self._scheduled: list[tuple[float, Callable[[], None]]] = []  # (time, action), in order

    def wait(self) -> Cause | None:
        """Wait until the launcher has ended, and return what ended the job."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_INTERVAL)
                break
            now = time.monotonic()
            self._schedule(now)
            while self._scheduled and now >= self._scheduled[0][0]:
                _, action = self._scheduled.pop(0)
                action()
        self._kill_ranks()  # if the launcher died before them
        return self.ended_by

    def _schedule(self, now: float) -> None:
        """Decide what is to be done to the job and when.

        A new signal replaces what was scheduled, and so does the time limit; the state of the ranks
        counts only while nothing is scheduled.
        """
        if len(self._signals) > self._handled_signals:
            if self.ended_by is None:
                self.ended_by = self._signals[0]
                self._ranks.send_signal(self._signals[0])
            grace = _SIGNAL_GRACE if self._handled_signals == 0 else 0.0
            self._scheduled = self._kill_from(now + grace)
            self._handled_signals = len(self._signals)
        elif self.ended_by is None and now > self._deadline:
            self.ended_by = "timeout"
            self._ranks.dump_stacks()
            self._scheduled = self._kill_from(now + _STACK_DUMP_GRACE)
        elif not self._scheduled:
            self._react_to_ranks(now)

    def _react_to_ranks(self, now: float) -> None:
        """Schedule the end of the job if all ranks have ended, one has failed, or one is missed."""
        codes = self._ranks.exit_codes()
        if len(codes) == self._ranks.n:
            self._deadline = float("inf")  # it is the launcher that lasts
            self._scheduled = [(now + _LAUNCHER_GRACE, self._kill_launcher)]
        elif any(0 < code <= 128 for code in codes.values()):
            self._scheduled = self._terminate_from(now + _FAILURE_GRACE)
        elif self.deadlock is None and now - self._last_look > _STAGE_INTERVAL:
            self._last_look = now
            self._look_for_deadlock(now, codes)

    def _look_for_deadlock(self, now: float, codes: Mapping[int, int]) -> None:
        """End the deadlock in which the ranks have been for a while, if there is one."""
        found = find_deadlock(self._ranks.n, codes, self._ranks.stages())
        if found is None or self._suspected is None or found.kind != self._suspected.kind:
            self._suspected_since = now
        elif now - self._suspected_since > _FAILURE_GRACE:
            self.deadlock = found
            self.ended_by = found.kind
            if found.kind == "end":
                self._ranks.release()
                self._scheduled = [(now + _LAUNCHER_GRACE, self._kill_launcher)]
            else:
                self._scheduled = self._terminate_from(now)
        self._suspected = found

    def _terminate_from(self, start: float) -> list[tuple[float, Callable[[], None]]]:
        return [(start, self._terminate_ranks), *self._kill_from(start + _SIGNAL_GRACE)]

    def _kill_from(self, start: float) -> list[tuple[float, Callable[[], None]]]:
        return [(start, self._kill_ranks), (start + _LAUNCHER_GRACE, self._kill_launcher)]

    def _terminate_ranks(self) -> None:
        self._ranks.send_signal(signal.SIGTERM)

    def _kill_ranks(self) -> None:
        self._ranks.send_signal(signal.SIGKILL)
        self._ranks.kill_workers()

    def _kill_launcher(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
