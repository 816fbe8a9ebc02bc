"""Choice of the device that exchanges a rank's model, and of the memory of its payload slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from mpi_dasgd.device.base import Device
from mpi_dasgd.device.host import HOST

if TYPE_CHECKING:
    from mpi_dasgd.algorithms.build import RunParts
    from mpi_dasgd.config import Config
    from mpi_dasgd.world import World

__all__ = ["DeviceChoice", "choose_device"]


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


def choose_device(
    environment: World, tensor_device: torch.device, config: Config, run: RunParts
) -> DeviceChoice:
    """Choose where the models of all ranks are exchanged. Collective.

    Args:
        environment: the ranks, and this one's place among them.
        tensor_device: device of this rank's parameters.
        config: configuration of the run.
        run: algorithm, codec and topology of the run.

    Raises:
        UserError: on all ranks: `transport.memory` demands what is not possible.
    """
    return DeviceChoice()
