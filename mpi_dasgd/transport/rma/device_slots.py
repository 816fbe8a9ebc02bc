"""Implementation of `Slots` in memory of GPUs, which the kernels of all ranks use in place.

A message has two parts. Header and trailer, which the host reads and writes, are in host memory
that the ranks share; scales, checksums and payload are in a *region* of the owner's GPU, which it
exports and the others open. All ranks are on one node.

Rules of CUDA IPC: a process opens a region once, and never its own; it is closed before its owner
frees it; and all work on it is done before that. So the order of the end is: own work, opened
regions, barrier, own region. Where a rank has died there is no barrier, and nothing is freed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.device.base import HANDLE_BYTES, Device, Region
from mpi_dasgd.errors import DeviceFailed, UserError

__all__ = ["DeviceSlots"]

_BODY_ALIGNMENT = 256  # bytes; that of the driver's allocations
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ERROR_BYTES = 400
_RECORD = np.dtype(
    [
        ("boot_id", "S36"), ("device", "S16"), ("process", np.int64), ("nbytes", np.int64),
        ("handle", np.uint8, (HANDLE_BYTES,)), ("error", f"S{_ERROR_BYTES}"),
    ]
)  # fmt: skip
"""What the ranks tell each other of their regions; an error instead of what it would not find."""


class DeviceSlots:
    """Payload slots in memory of GPUs. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks, which are on one node.
        layout: layout of every message.
        count: number of slots per rank.
        device: device of this rank.
        reachable: ranks whose slots this rank uses, itself or not.

    Raises:
        UserError: on all ranks: one has no memory for its slots, or cannot open another one's.

    Attributes:
        layout: layout of every message.
        node_ranks: ranks whose slots are in place: all.
        transfer_mode: how payload is transferred, for users to read.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        layout: Layout,
        count: int,
        device: Device,
        reachable: Iterable[int],
    ) -> None:
        self.layout = layout
        self.node_ranks = list(range(comm.size))
        self.transfer_mode = "in place (CUDA IPC)"
        self._comm = comm
        self._device = device
        self._own: Region | None = None
        self._opened: dict[int, Region] = {}
        self._window: MPI.Win | None = None
        self._messages: dict[int, list[Message]] = {}
        if count == 0:
            return
        pitch = -(-layout.body_nbytes // _BODY_ALIGNMENT) * _BODY_ALIGNMENT
        records = self._allocate(pitch * count)
        self._open(records, set(reachable) - {comm.rank})
        envelopes = self._allocate_envelopes(count)
        for rank, region in {comm.rank: self._own, **self._opened}.items():
            assert region is not None, "it is allocated, or all ranks have raised"
            self._messages[rank] = [
                Message(
                    envelopes[rank][index],
                    layout,
                    body=region.array[index * pitch : index * pitch + layout.body_nbytes],
                )
                for index in range(count)
            ]

    def _allocate(self, nbytes: int) -> np.ndarray:
        """Allocate the own region, and return the records of all. Collective."""
        own = np.zeros(1, _RECORD)
        own["boot_id"], own["device"] = _BOOT_ID.read_text().strip(), self._device.name
        own["process"], own["nbytes"] = os.getpid(), nbytes
        try:
            self._own = self._device.allocate(nbytes)
            own["handle"][0] = np.frombuffer(self._own.export(), np.uint8)
        except (DeviceFailed, UserError) as error:
            own["error"] = str(error).encode()[:_ERROR_BYTES]
        records = self._exchange(own)
        if len(set(records["boot_id"])) > 1:
            self._fail("they are on several machines")
        self._require_success(records)
        return records

    def _open(self, records: np.ndarray, ranks: Iterable[int]) -> None:
        """Open the regions of `ranks`. Collective."""
        own = records[self._comm.rank : self._comm.rank + 1].copy()
        for rank in sorted(ranks):
            theirs = records[rank]
            try:
                self._opened[rank] = self._device.open_region(
                    theirs["handle"].tobytes(), int(theirs["nbytes"])
                )
            except DeviceFailed as error:
                owner = f"that of rank {rank}, {theirs['device'].decode()}"
                own["error"] = f"{owner}: {error}".encode()[:_ERROR_BYTES]
                break
        self._require_success(self._exchange(own))

    def _exchange(self, own: np.ndarray) -> np.ndarray:
        """Gather a record of each rank. Collective."""
        records = np.zeros(self._comm.size, _RECORD)
        self._comm.Allgather(own.view(np.uint8), records.view(np.uint8))
        return records

    def _require_success(self, records: np.ndarray) -> None:
        """Raise on all ranks if one has met an error; its message is the first one's."""
        for rank, error in enumerate(records["error"]):
            if error:
                self._fail(f"rank {rank}: {error.decode(errors='replace')}")

    def _fail(self, reason: str) -> None:
        """Free everything, and raise. Collective.

        Raises:
            UserError: always, on all ranks.
        """
        with contextlib.suppress(DeviceFailed):
            self.close()
        raise UserError(
            f"transport.memory: 'ipc' needs payload slots in memory of the GPUs that all ranks of "
            f"one node can use, but {reason}; set transport.memory=host, or see what `mpi-dasgd "
            "doctor` says",
            on_all_ranks=True,
        )

    def _allocate_envelopes(self, count: int) -> list[np.ndarray]:
        """Allocate shared memory; return that of each rank, (count, envelope). Collective."""
        nbytes = count * self.layout.envelope_nbytes
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
        self._window = MPI.Win.Allocate_shared(nbytes, 1, info=info, comm=self._comm)
        info.Free()
        self._window.Lock_all(MPI.MODE_NOCHECK)
        return [
            np.frombuffer(self._window.Shared_query(rank)[0], np.uint8, nbytes).reshape(count, -1)
            for rank in self.node_ranks
        ]

    def view(self, rank: int, index: int) -> Message:
        """Return slot `index` of `rank` in place."""
        return self._messages[rank][index]

    def get(self, rank: int, index: int, out: Message) -> None:
        """Raise: all slots are in place.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("slots in memory of GPUs are used in place")

    def put(self, rank: int, index: int, message: Message) -> None:
        """Raise: all slots are in place.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("slots in memory of GPUs are used in place")

    def fence(self) -> None:
        """Order loads and stores of headers and trailers before this call and those after it."""
        if self._window is not None:
            self._window.Sync()

    def close(self) -> None:
        """Free the memory, in any thread, once all work of all ranks is done.

        Raises:
            DeviceFailed: the device has failed.
        """
        self._messages.clear()
        try:
            try:
                self._device.bind()
                while self._opened:
                    self._opened.popitem()[1].close()
            finally:  # the others wait here, and in `Free`, whatever has failed
                self._comm.Barrier()
            own, self._own = self._own, None
            if own is not None:
                own.close()
        finally:
            window, self._window = self._window, None
            if window is not None:
                window.Unlock_all()
                window.Free()
