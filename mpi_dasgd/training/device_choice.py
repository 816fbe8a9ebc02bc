"""Choice of the device that exchanges a rank's model, and of the memory of its payload slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST

__all__ = ["DeviceChoice"]


@dataclass(frozen=True)
class DeviceChoice:
    """Where the models of all ranks are exchanged.

    Attributes:
        device: device of this rank that exchanges its model; the host also for a model on a GPU
            that is copied there.
        memory: memory of the payload slots, the same on all ranks.
        reason: why, for users to read; "" where there was nothing to choose.
    """

    device: Device = HOST
    memory: Literal["host", "ipc"] = "host"
    reason: str = ""
