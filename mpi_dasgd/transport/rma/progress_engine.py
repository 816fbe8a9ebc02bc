"""Progress engine: the current progress thread, and its replacement when it is stalled."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.membership import Membership
from mpi_dasgd.transport.rma.progress_context import ProgressContext

__all__ = ["RETRY_SECONDS", "ProgressEngine"]

RETRY_SECONDS = 0.0003  # before the progress thread tries a remote rank again


class ProgressEngine:
    """Runs tasks in a progress thread. Its methods are called by the compute thread and by tasks.

    A thread that is stalled in a call is replaced. Its current peer is *quarantined* until the call
    returns: no request is sent to it, what must reach it waits, and the time counts as its silence.

    Args:
        membership: where ranks that cannot be reached are marked as dead.
        new_context: makes a context and starts its thread, which must pass the context to every
            task. Called with the context that it supersedes, or None.

    Attributes:
        counters: counts of every progress thread so far.
    """

    def __init__(
        self,
        membership: Membership,
        new_context: Callable[[ProgressContext | None], ProgressContext],
    ) -> None:
        self.counters: list[Counters] = []
        self._membership = membership
        self._new_context = new_context
        self._context = self._start(None)

    def _start(self, superseded: ProgressContext | None) -> ProgressContext:
        context = self._new_context(superseded)
        self.counters.append(context.counters)
        return context

    def submit(self, task: Callable[[ProgressContext], None]) -> None:
        """Have the progress thread run `task`."""
        self._context.thread.submit(task)

    def submit_for(self, rank: int, task: Callable[[ProgressContext], None]) -> None:
        """Have the progress thread run `task` with `rank` as its current peer.

        The task waits while the rank is quarantined, and is dropped if the rank is gone.
        """

        def attempt(context: ProgressContext) -> None:
            if self._membership.is_unreachable(rank):
                return
            if rank in context.quarantined or not context.switch_to(rank):
                time.sleep(RETRY_SECONDS)
                self.submit(attempt)
                return
            with self._membership.mark_dead_on_failure(rank):
                task(context)

        self.submit(attempt)

    def check(self, stall_timeout: float) -> None:
        """Replace the progress thread if one call has blocked it for over `stall_timeout` seconds.

        Raises:
            BaseException: whatever failed in the progress thread.
        """
        stalled = self._context
        stalled.check()
        if stalled.stalled_peer(stall_timeout) is None:
            return
        stalled.supersede()
        # Only the timeout counts as silence: a longer wait may be a pause of this process itself.
        self._membership.add_silence(stalled.current_peer, stall_timeout)
        self._context = self._start(stalled)
        stalled.thread.replace(self._context.thread)
        if stalled.on_supersede is not None:
            stalled.on_supersede()

    def stalled_peers(self, stall_timeout: float) -> set[int]:
        """Return the rank that has blocked the progress thread for over `stall_timeout` seconds."""
        peer = self._context.stalled_peer(stall_timeout)
        return set() if peer is None else {peer}

    @property
    def quarantined(self) -> set[int]:
        """Ranks that superseded threads are still blocked on."""
        return self._context.quarantined

    @property
    def idle(self) -> bool:
        """Whether all submitted tasks are finished."""
        return self._context.thread.idle

    def close(self, timeout: float) -> bool:
        """Finish the tasks and end the thread; return False if it is stalled."""
        return self._context.close(timeout)
