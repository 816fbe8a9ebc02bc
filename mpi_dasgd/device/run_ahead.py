"""How far the host may run ahead of the device when it claims a partner's model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mpi_dasgd.device.base import Device, Mark

__all__ = ["RunAhead"]


class RunAhead:
    """Keeps the host from claiming models long before the device can use them.

    A claim that is made a whole step early costs a tenth of the exchanges, and three to five times
    the consensus distance. So the host waits, before it claims, until the device has passed the
    beginning of the step, which is the end of the backward pass; the optimizer's work is in the
    queue behind it, so that the device does not run dry.

    Args:
        device: device of this rank.
        steps: steps by which the host may be ahead beyond that, `transport.ahead`.

    Attributes:
        on_caught_up: called when the host has waited, before it claims.
    """

    def __init__(self, device: Device, steps: int = 0) -> None:
        self._device = device
        self._steps = steps
        # an earlier mark is passed when a later one is
        self._marks: deque[Mark] = deque(maxlen=steps + 1)
        self.on_caught_up: Callable[[], object] = _ignore

    def begin_step(self) -> None:
        """Mark the beginning of a step, its gradient, on torch's current stream."""
        if self._device.is_asynchronous:
            self._marks.append(self._device.mark())

    def catch_up(self) -> None:
        """Wait until the device has passed the beginning of the step `steps` ago.

        Raises:
            DeviceFailed: the device has failed.
        """
        if len(self._marks) > self._steps:
            self._marks.popleft().wait()
            self.on_caught_up()


def _ignore() -> None:
    pass
