"""Background thread that writes to disk, one per process."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Writer", "writer"]

T = TypeVar("T")


class Writer:
    """Thread that runs tasks in the order given, and repeated tasks when they are due.

    One thread suffices because HDF5 runs one call at a time anyway. It is a daemon: callers wait
    for the futures of their tasks before the program ends.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._repeated: list[_Repeated] = []  # touched by the thread only
        threading.Thread(target=self._run, name="mpi_dasgd-writer", daemon=True).start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Run `task` once; the future holds its result or its exception."""
        future: Future[T] = Future()
        self._tasks.put((task, future))
        return future

    def repeat(self, task: Callable[[], bool], seconds: float) -> Future[None]:
        """Run `task` every `seconds` until it returns True, raises, or the future is cancelled."""
        repeated = _Repeated(task, seconds)
        self.submit(lambda: self._repeated.append(repeated))
        return repeated.future

    def _run(self) -> None:
        while True:
            due = min((repeated.due for repeated in self._repeated), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            try:
                task, future = self._tasks.get(timeout=timeout)
            except queue.Empty:
                pass
            else:
                _run_task(task, future)
                del task, future  # a finished task must not keep its buffers alive
            self._repeated = [task for task in self._repeated if not task.finished()]


class _Repeated:
    """Task that runs at a fixed interval."""

    def __init__(self, task: Callable[[], bool], seconds: float) -> None:
        self.future: Future[None] = Future()
        self.due = time.monotonic() + seconds
        self._task = task
        self._seconds = seconds

    def finished(self) -> bool:
        """Run the task if it is due; return whether that was its last run."""
        if self.future.cancelled():
            return True
        if time.monotonic() < self.due:
            return False
        try:
            last = self._task()
        except Exception as error:
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
            return True
        if last and self.future.set_running_or_notify_cancel():
            self.future.set_result(None)
        self.due = time.monotonic() + self._seconds
        return last


def _run_task(task: Callable[[], Any], future: Future[Any]) -> None:
    """Run `task` and store its result or exception in `future`."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(task())
    except Exception as error:
        future.set_exception(error)


@functools.cache
def writer() -> Writer:
    """Return the writer of this process, started at the first call."""
    return Writer()
