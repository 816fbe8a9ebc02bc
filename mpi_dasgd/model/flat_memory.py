"""Flat memory that the run owns, and byte ranges of tensors that may share memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils import dlpack

from mpi_dasgd.errors import UserError

__all__ = [
    "FlatMemory",
    "byte_range",
    "group_overlapping",
    "holders",
    "move_elsewhere",
    "same_format",
    "storage_id",
]

_ALIGNMENT = 64  # bytes: a line of the cache


class FlatMemory:
    """Real numbers in one piece, of which parts are given away as tensors.

    Each part has a storage of its own: what others do with the storage of a part (`share_memory_`
    moves it elsewhere, for example) neither frees nor moves this memory, `torch.save` of a part
    writes that part alone, and who tells tensors apart by their storages, as accelerate and
    safetensors do, takes no two parameters for one.

    On the CPU the memory is NumPy's; elsewhere it is torch's, and its parts come by way of DLPack,
    of which torch makes a storage for each [CPU and CUDA; `aten/src/ATen/DLConvertor.cpp`].

    Args:
        elements: number of elements; all are 0.
        dtype: their type, a real one.
        device: where they are.

    Attributes:
        dtype: type of the elements.
        tensor: all of them, (elements,); not to be given away.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._bytes: np.ndarray | None = None
        if device.type == "cpu":
            nbytes = elements * dtype.itemsize
            memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % _ALIGNMENT
            self._bytes = memory[start : start + nbytes]
            self.tensor = self.part(0, elements)
        else:
            self.tensor = torch.zeros(elements, dtype=dtype, device=device)

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Return the elements from `start` to `stop`, in place.

        Raises:
            UserError: torch has no DLPack for the device.
        """
        if self._bytes is None:
            return _with_own_storage(self.tensor[start:stop])
        size = self.dtype.itemsize
        part = torch.from_numpy(self._bytes[start * size : stop * size]).view(self.dtype)
        return part.data  # without a base, which would hold the storage too


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return dlpack.from_dlpack(dlpack.to_dlpack(tensor))  # type: ignore[attr-defined]
    except (RuntimeError, BufferError) as error:
        raise UserError(
            f"model: parameters are on {tensor.device}, expected the CPU or an NVIDIA GPU: {error}"
        ) from error


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of `tensor` and behind its last one."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize


def group_overlapping(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the positions of `tensors`, in groups of those whose memory overlaps, in order."""
    groups: list[list[int]] = []
    end = -1
    for (start, stop), index in sorted((byte_range(t), i) for i, t in enumerate(tensors)):
        if start < min(end, stop):  # an empty one overlaps with nothing
            groups[-1].append(index)
        else:
            groups.append([index])
        end = max(end, stop)
    return sorted(sorted(group) for group in groups)


def holders(tensor: torch.Tensor) -> int:
    """Return how many tensors, and others, hold the storage of `tensor`, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # `storage` here is one


def storage_id(tensor: torch.Tensor) -> int:
    """Return what tells the storage of `tensor` from all others that exist; 0 if it has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, ValueError):  # sparse and uninitialized ones
        return 0


def same_format(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors of one shape have their elements in the same order."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(mine == other for n, mine, other in strides if n > 1)


def move_elsewhere(tensor: torch.Tensor, name: str) -> None:
    """Move the storage of `tensor` to shared memory, with its values: nothing else replaces one.

    Args:
        tensor: a tensor; all that have its storage go along.
        name: name of the parameter, for the message.

    Raises:
        UserError: there is not enough shared memory, or the tensor is not on the CPU.
    """
    storage, problem = tensor.untyped_storage(), ""
    if storage.device.type != "cpu":
        problem = f"it cannot be moved elsewhere on {storage.device}"
    elif _free_shared_memory() < 2 * storage.nbytes():
        problem = f"/dev/shm has no room for {storage.nbytes()} bytes to keep the values"
    if problem:
        raise UserError(
            f"model: parameter {name} was given other memory (p.data = ...) while its own, which "
            f"exchanges change, is still in use elsewhere, and {problem}; keep a copy instead, as "
            "in backup = p.detach().clone()"
        )
    storage.share_memory_()


def _free_shared_memory() -> int:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize
