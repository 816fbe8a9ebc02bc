"""Stream of a GPU on which a rank trains: copies that do not wait, and marks that carry a time."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mpi_dasgd.device.base import Mark
from mpi_dasgd.errors import DeviceFailed

__all__ = ["CudaStream", "DeviceStream", "TimedMark", "device_stream"]


class TimedMark(Mark, Protocol):
    """A point in the order of a stream's work, and the time at which the device passed it."""

    def seconds_since(self, earlier: Any) -> float:
        """Return the seconds from an earlier mark of the stream to this one; both are done."""


class DeviceStream(Protocol):
    """Stream of a device on which a rank computes its gradients, one step after the other."""

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of the host to the device, in the order of the stream."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of the device to the host; it is there when a later mark is done."""

    def mark(self) -> TimedMark:
        """Return a mark behind all work that was asked for so far."""

    def keep_busy(self, seconds: float) -> None:
        """Occupy the device for so long, in the order of the stream."""


class _CudaMark:
    """An event on torch's current stream.

    Args:
        device: torch's name of the device.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        # The host sleeps in `synchronize` instead of spinning: other ranks need the core.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    @property
    def is_done(self) -> bool:
        """Whether the device has passed it."""
        try:
            return bool(self._event.query())
        except RuntimeError as error:
            raise DeviceFailed(f"{self._device}: {error}") from error

    def wait(self) -> None:
        """Wait until the device has passed it."""
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise DeviceFailed(f"{self._device}: {error}") from error

    def seconds_since(self, earlier: _CudaMark) -> float:
        """Return the seconds from an earlier mark to this one."""
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1e3


class CudaStream:
    """Torch's current stream on a CUDA device; see `DeviceStream`.

    Args:
        device: torch's name of the device.
    """

    # Clock cycles of a launch that tells how long a cycle is: some milliseconds.
    _CALIBRATION = 10_000_000
    # Seconds of such launches until the clock counts: an idle GPU's is a fifth of a busy one's.
    _WARM_UP_SECONDS = 0.2

    def __init__(self, device: str) -> None:
        self._device = device
        self._cycles_per_second = 0.0

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor through pinned memory, which torch keeps until the copy is made."""
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to pinned memory."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> TimedMark:
        """Record an event on torch's current stream."""
        return _CudaMark(self._device)

    def keep_busy(self, seconds: float) -> None:
        """Launch a kernel that counts clock cycles; the first call measures how long they are."""
        if not self._cycles_per_second:
            self._cycles_per_second = self._measure_clock()
        torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def _measure_clock(self) -> float:
        """Return the clock cycles in a second, once the device has been busy for a while. Waits."""
        busy = 0.0
        while True:
            begin = self.mark()
            torch.cuda._sleep(self._CALIBRATION)
            end = self.mark()
            end.wait()
            seconds = end.seconds_since(begin)
            busy += seconds
            if busy >= self._WARM_UP_SECONDS:
                return self._CALIBRATION / seconds


def device_stream(device: str) -> DeviceStream | None:
    """Return the stream of a device in torch's notation; None for the host, which has none."""
    return None if device == "cpu" else CudaStream(device)
