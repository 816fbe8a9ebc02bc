"""Flat memory as it is made on a GPU, on the CPU."""

from __future__ import annotations

import torch

from mpi_dasgd.model.flat_memory import FlatMemory

__all__ = ["DeviceMemory"]


class DeviceMemory(FlatMemory):
    """`FlatMemory` of torch's memory, whatever the device."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._bytes = dtype, None
        self.tensor = torch.zeros(elements, dtype=dtype, device=device)
