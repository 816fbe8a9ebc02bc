"""Courier: the thread that talks to other nodes, so that the compute thread never waits for a network.

Between nodes over TCP nothing completes while the target is outside MPI, whatever the MPI: the courier
therefore also calls into MPI at short intervals. Within a node puts complete by themselves; then it
only beats the heart, a few times a second.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

__all__ = ["ProgressThread"]


class ProgressThread:
    """Runs tasks in order, and chores at intervals, in one thread.

    Args:
        periodic_task: called every `chore_interval` seconds: heartbeats, notices of other ranks.
        chore_interval: seconds.
        mpi_progress: called every `progress_interval` seconds and after every task, or None.
        progress_interval: seconds.
        arguments: given to every task and chore.
    """

    def __init__(
        self,
        periodic_task: Callable[..., None],
        chore_interval: float,
        mpi_progress: Callable[[], object] | None = None,
        progress_interval: float = 0.0003,
        arguments: tuple[object, ...] = (),
    ) -> None:
        self._periodic_task = periodic_task
        self._task_interval = chore_interval
        self._mpi_progress = mpi_progress
        self._wait = progress_interval if mpi_progress else chore_interval
        self._arguments = arguments
        self._tasks: queue.SimpleQueue[Callable[..., None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._successor: ProgressThread | None = None
        self._error: BaseException | None = None
        self._since: float | None = None
        self._submitted = 0  # under the lock
        self._finished = 0  # by the thread only
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[..., None]) -> None:
        """Have `task` run after those submitted before, by the successor if there is one."""
        with self._lock:
            if self._successor is None:
                self._submitted += 1
                self._tasks.put(task)
                return
        self._successor.submit(task)

    def replace(self, successor: ProgressThread) -> None:
        """Leave this thread, stuck in a task, behind; `successor` gets the others, and those to come."""
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
        """Raise here what failed in the thread."""
        if self._error is not None:
            raise self._error

    @property
    def alive(self) -> bool:
        """Whether the thread runs, or is stuck."""
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether all submitted tasks are finished."""
        return self._finished == self._submitted

    @property
    def busy_seconds(self) -> float:
        """Seconds that the task or chore in hand has taken so far; 0 if there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def close(self, timeout: float = 10.0) -> bool:
        """Finish the tasks and end the thread; return False if it is stuck and was left behind."""
        self._tasks.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        chore_due = 0.0
        try:
            while True:
                try:
                    task = self._tasks.get(timeout=self._wait)
                except queue.Empty:
                    pass
                else:
                    if task is None:
                        return
                    if self._successor is not None:  # since it was taken from the queue
                        self._successor.submit(task)
                        return
                    self._since = time.monotonic()
                    task(*self._arguments)
                    self._since = None
                    self._finished += 1
                    if self._successor is not None:
                        return
                if self._mpi_progress is not None:
                    self._mpi_progress()
                if time.monotonic() >= chore_due:
                    self._since = time.monotonic()
                    self._periodic_task(*self._arguments)
                    self._since = None
                    if self._successor is not None:
                        return
                    chore_due = time.monotonic() + self._task_interval
        except BaseException as error:  # handed to the compute thread by `check`
            self._error = error
