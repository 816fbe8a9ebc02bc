"""Events of CUDA: points in the order of a stream, used again and again."""

from __future__ import annotations

from collections import deque

from mpi_dasgd.device.cuda_calls import CudaCalls

__all__ = ["CudaEvents", "CudaMark"]

_NOT_READY = 600  # cudaErrorNotReady


class CudaEvents:
    """The events of a device that no mark uses now; creating one costs much more than recording it.

    Args:
        calls: what CUDA says to the calls of the device.
    """

    def __init__(self, calls: CudaCalls) -> None:
        self._calls = calls
        self._free: deque[int] = deque()  # appended to and popped by any thread

    def mark(self, stream: int) -> CudaMark:
        """Return a mark behind all work that was asked for so far on `stream`.

        Args:
            stream: its handle.

        Raises:
            DeviceFailed: the device has failed.
        """
        runtime = self._calls.runtime
        with self._calls.checked("recording an event"):
            try:
                event = self._free.pop()
            except IndexError:
                # Who waits for it sleeps, instead of spinning on a core that MPI needs.
                flags = runtime.eventBlockingSync | runtime.eventDisableTiming
                event = runtime.eventCreateWithFlags(flags)
            mark = CudaMark(self._calls, self._free, event)
            runtime.eventRecord(event, stream)
        return mark


class CudaMark:
    """A point of a stream; see `Mark`.

    Its event is free again when the mark is forgotten, even if the device has not passed it: what
    already waits for an event waits for the point at which it was recorded then.

    Attributes:
        event: handle of its event.
    """

    def __init__(self, calls: CudaCalls, free: deque[int], event: int) -> None:
        self._calls = calls
        self._free = free
        self.event = event
        self._is_passed = False

    def __del__(self) -> None:
        self._free.append(self.event)

    @property
    def is_done(self) -> bool:
        """Whether the device has passed it.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self._is_passed:
            return True
        self._calls.require_working()
        # CuPy's `Event.done` says "not yet", for ever, of a device that has failed.
        status = self._calls.runtime.eventQuery(self.event)
        if status == _NOT_READY:
            return False
        self._calls.require_success("the work before an event", status)
        self._is_passed = True
        return True

    def wait(self) -> None:
        """Wait until the device has passed it, without the GIL.

        Raises:
            DeviceFailed: the device has failed.
        """
        if not self._is_passed:
            with self._calls.checked("the work before an event"):
                self._calls.runtime.eventSynchronize(self.event)
            self._is_passed = True
