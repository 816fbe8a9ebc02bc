"""Progress thread: calls MPI, so that the compute thread never waits for a network.

Between nodes over TCP nothing completes while the target is outside MPI, whatever the MPI library:
the thread therefore also calls into MPI at short intervals. Within a node Puts complete by
themselves; then it only sends heartbeats, a few times per second.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from mpi_dasgd import child_processes

__all__ = ["ProgressThread"]


class ProgressThread:
    """A thread that runs submitted tasks in order, and a periodic task.

    Args:
        periodic_task: called every `period` seconds: heartbeats, status of other ranks.
        period: seconds.
        mpi_progress: called every `progress_interval` seconds and after every task; None: never.
        progress_interval: seconds.
        arguments: passed to every task and to the periodic task.
    """

    def __init__(
        self,
        periodic_task: Callable[..., None],
        period: float,
        mpi_progress: Callable[[], object] | None = None,
        progress_interval: float = 0.0003,
        arguments: tuple[object, ...] = (),
    ) -> None:
        self._periodic_task = periodic_task
        self._period = period
        self._mpi_progress = mpi_progress
        self._wait_seconds = progress_interval if mpi_progress else period
        self._arguments = arguments
        self._tasks: queue.SimpleQueue[Callable[..., None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._successor: ProgressThread | None = None
        self._error: BaseException | None = None
        self._busy_since: float | None = None
        self._submitted = 0  # under the lock
        self._finished = 0  # by the thread only
        self._thread = threading.Thread(target=self._run, name="mpi-dasgd-progress", daemon=True)
        self._thread.start()
        child_processes.shield_from_failure_signal()

    def submit(self, task: Callable[..., None]) -> None:
        """Run `task` after those submitted before; a successor runs it if there is one."""
        with self._lock:
            if self._successor is None:
                self._submitted += 1
                self._tasks.put(task)
                return
        self._successor.submit(task)

    def replace(self, successor: ProgressThread) -> None:
        """Abandon this thread, which is stalled in a task; `successor` runs all other tasks."""
        with self._lock:
            while True:
                try:
                    task = self._tasks.get_nowait()
                except queue.Empty:
                    break
                if task is not None:
                    successor.submit(task)
            self._successor = successor

    def check(self) -> None:
        """Raise in the calling thread what failed in this one.

        Raises:
            BaseException: whatever a task, the periodic task or `mpi_progress` raised.
        """
        if self._error is not None:
            raise self._error

    @property
    def alive(self) -> bool:
        """Whether the thread runs or is stalled."""
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether all submitted tasks are finished."""
        return self._finished == self._submitted

    @property
    def busy_seconds(self) -> float:
        """Seconds that the current task has taken so far; 0 if none runs."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self, timeout: float = 10.0) -> bool:
        """Finish the tasks and end the thread; return False if it is stalled and still alive."""
        self._tasks.put(None)
        self._thread.join(timeout)
        child_processes.accept_failure_signal()
        return not self._thread.is_alive()

    def _run(self) -> None:
        child_processes.accept_failure_signal()
        next_period = 0.0
        try:
            while True:
                try:
                    task = self._tasks.get(timeout=self._wait_seconds)
                except queue.Empty:
                    pass
                else:
                    if task is None:
                        return
                    if self._successor is not None:  # since the task was taken from the queue
                        self._successor.submit(task)
                        return
                    self._busy_since = time.monotonic()
                    task(*self._arguments)
                    self._busy_since = None
                    self._finished += 1
                    if self._successor is not None:
                        return
                if self._mpi_progress is not None:
                    self._mpi_progress()
                if time.monotonic() >= next_period:
                    self._busy_since = time.monotonic()
                    self._periodic_task(*self._arguments)
                    self._busy_since = None
                    if self._successor is not None:
                        return
                    next_period = time.monotonic() + self._period
        except BaseException as error:  # raised in the compute thread by `check`
            self._error = error
