"""Memory of a GPU for payload slots, and host memory that a GPU writes.

CUDA exports whole allocations, and small ones share a block of 2 MiB with strangers. So a region is
an allocation of its own, of whole blocks: never memory of torch's or CuPy's pools.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from mpi_dasgd.device.base import Array
from mpi_dasgd.device.cuda_calls import CudaCalls
from mpi_dasgd.errors import UserError

__all__ = ["GRANULARITY", "CudaMemory", "ImportedRegion", "OwnRegion"]

GRANULARITY = 2 << 20
"""A region's size is a multiple of it, bytes."""

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

_exported: set[bytes] = set()  # handles of this process's own regions
_imported: dict[bytes, list[int]] = {}  # those of others that are open: address, number of users


class OwnRegion:
    """An allocation of this process; see `Region`.

    Args:
        memory: where it was allocated.
        address: its address.
        nbytes: its length as asked for, bytes.

    Attributes:
        array: the memory, uint8, (nbytes,).
    """

    def __init__(self, memory: CudaMemory, address: int, nbytes: int) -> None:
        self.array = memory.array(address, (nbytes,), np.dtype(np.uint8))
        self._calls = memory.calls
        self._address: int | None = address
        self._handle: bytes | None = None

    def export(self) -> bytes:
        """Return the handle by which other processes of the node open it.

        Raises:
            DeviceFailed: CUDA does not export it.
        """
        runtime = self._calls.runtime
        self._calls.require_working()
        try:
            self._handle = bytes(runtime.ipcGetMemHandle(self._address))
        except runtime.CUDARuntimeError as error:
            raise self._calls.refused("exporting a region (cudaIpcGetMemHandle)", error) from error
        _exported.add(self._handle)
        return self._handle

    def close(self) -> None:
        """Free it, once all work is done and the other processes have closed it.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self._address is None:
            return
        if self._handle is not None:
            _exported.discard(self._handle)
        with self._calls.checked("freeing a region"):
            self._calls.runtime.free(self._address)
        self._address = None


class ImportedRegion:
    """An allocation of another process of the node; see `Region`.

    Args:
        memory: where it is opened.
        handle: its handle.
        address: its address in this process.
        nbytes: its length, bytes.

    Attributes:
        array: the memory, uint8, (nbytes,).
    """

    def __init__(self, memory: CudaMemory, handle: bytes, address: int, nbytes: int) -> None:
        self.array = memory.array(address, (nbytes,), np.dtype(np.uint8))
        self._calls = memory.calls
        self._handle: bytes | None = handle

    def export(self) -> bytes:
        """Raise: only its owner exports it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a region is exported by the process that has allocated it")

    def close(self) -> None:
        """Close it, once all work is done.

        Raises:
            DeviceFailed: the device has failed.
        """
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        _imported[handle][1] -= 1
        if not _imported[handle][1]:
            address, _ = _imported.pop(handle)
            with self._calls.checked("closing another rank's region"):
                self._calls.runtime.ipcCloseMemHandle(address)


class CudaMemory:
    """Allocations of a GPU outside of all pools.

    Args:
        cupy: the module.
        calls: what CUDA says to the calls of the device.
        index: number of the device.

    Attributes:
        calls: what CUDA says to the calls of the device.
    """

    def __init__(self, cupy: Any, calls: CudaCalls, index: int) -> None:
        self.calls = calls
        self._cupy = cupy
        self._index = index

    def array(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Return an array of CuPy over memory that CuPy does not own."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = self._cupy.cuda.UnownedMemory(address, nbytes, self, self._index)
        return self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(memory, 0))

    def allocate(self, nbytes: int) -> OwnRegion:
        """Allocate a region, filled with zeros. Waits.

        Args:
            nbytes: its length; it takes the next multiple of `GRANULARITY`.

        Raises:
            UserError: there is not enough memory.
            DeviceFailed: the device has failed.
        """
        size = max(1, -(-nbytes // GRANULARITY)) * GRANULARITY
        runtime = self.calls.runtime
        with self.calls.checked("allocating a region"):
            address = self._malloc(size)
            if address is None:  # torch and CuPy keep what they no longer use
                torch.cuda.empty_cache()
                self._cupy.get_default_memory_pool().free_all_blocks()
                address = self._malloc(size)
            if address is None:
                free, total = runtime.memGetInfo()
                raise UserError(
                    f"the payload slots need {size:,} bytes on {self.calls.device}, of which "
                    f"{free:,} of {total:,} are free: use a smaller model or batch, fewer slots "
                    "(transport.publication_slots, transport.inbox_slots), fewer bits (codec), or "
                    "transport.memory=host"
                )
            runtime.memset(address, 0, size)
            runtime.deviceSynchronize()  # on the legacy stream, for which no other one waits
        return OwnRegion(self, address, nbytes)

    def _malloc(self, size: int) -> int | None:
        """Allocate memory and return its address; None if there is not enough."""
        runtime = self.calls.runtime
        try:
            return int(runtime.malloc(size))
        except runtime.CUDARuntimeError as error:
            if error.status == _OUT_OF_MEMORY:
                return None
            raise

    def open_region(self, handle: bytes, nbytes: int) -> ImportedRegion:
        """Open a region that another process of the node has exported.

        CUDA opens an allocation once in a process, and never in its own; who opens one again here
        gets the same memory.

        Args:
            handle: its handle.
            nbytes: its length, bytes.

        Raises:
            DeviceFailed: it cannot be opened.
        """
        self.calls.require_working()
        if handle in _exported:
            raise ValueError("a region is not opened in the process that has allocated it")
        if handle not in _imported:
            runtime = self.calls.runtime
            try:
                _imported[handle] = [int(runtime.ipcOpenMemHandle(handle)), 0]
            except runtime.CUDARuntimeError as error:
                operation = "opening another rank's region (cudaIpcOpenMemHandle)"
                raise self.calls.refused(operation, error) from error
        _imported[handle][1] += 1
        return ImportedRegion(self, handle, _imported[handle][0], nbytes)

    def mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Array, np.ndarray]:
        """Allocate zeros in host memory that the device writes and the host reads.

        They stay as long as the process. With CUDA's unified addresses, which all 64-bit systems
        have, both sides have the same address.

        Returns:
            The memory as the device sees it, and as the host sees it.

        Raises:
            DeviceFailed: the device has failed.
        """
        dtype = np.dtype(dtype)
        nbytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        runtime = self.calls.runtime
        with self.calls.checked("allocating mapped host memory"):
            flags = runtime.hostAllocMapped | runtime.hostAllocPortable
            address = int(runtime.hostAlloc(nbytes, flags))
        buffer = (ctypes.c_byte * nbytes).from_address(address)
        host = np.ndarray(shape, dtype, buffer)
        host[...] = 0
        return self.array(address, shape, dtype), host
