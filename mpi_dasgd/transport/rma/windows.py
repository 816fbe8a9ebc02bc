"""Implementation of `Words` and `Slots` on MPI windows: one for control words, one for payload.

Rules, each for a reason that was measured or read in the standard:

* Control words are in host memory of `Win.Allocate`, change only by `Compare_and_swap` and are read
  only by `Fetch_and_op(NO_OP)`, by their owner, too: this is what `accumulate_ops` promises by
  default.
* One `Lock_all` lasts from creation to `close`; `Flush` follows every operation whose result is
  needed.
* Payload is flushed before the swap that announces it: the standard orders neither.
* `acc_single_intrinsic` is set, or Open MPI's osc/rdma swaps a word of its own node by plain loads
  and
  stores, behind a lock that swaps from other nodes do not take: some of 10^5 are lost
  (`tests/programs/windows.py`).
* `Win.Create` is never used between ranks of one node, where sends are 15 to 60 times slower: they
  share memory.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from mpi4py import MPI

from mpi_dasgd.codecs import Layout, Message
from mpi_dasgd.errors import Unreachable, UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.rma.shared_memory import NodeWords

__all__ = ["WindowSlots", "WindowWords", "allocate_words"]

PIECE = 1 << 30  # bytes of one Get or Put: below the 32-bit counts of older libraries


class _Scratch(threading.local):
    """Operands of word operations, one set per thread, with their MPI descriptions prepared."""

    def __init__(self) -> None:
        self.new, self.expected, self.old = (np.zeros(1, np.int64) for _ in range(3))
        self.specs = [[a, 1, MPI.INT64_T] for a in (self.new, self.expected, self.old)]


class WindowWords:
    """Control words in a window. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks.
        count: number of words per rank.
    """

    def __init__(self, comm: MPI.Intracomm, count: int) -> None:
        info = MPI.Info.Create({"acc_single_intrinsic": "true"})
        self._window: MPI.Win | None = MPI.Win.Allocate(8 * count, 8, info=info, comm=comm)
        info.Free()
        np.frombuffer(self._window.tomemory(), np.int64)[:] = 0
        comm.Barrier()
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._scratch = _Scratch()

    def read(self, rank: int, index: int) -> int:
        """Return word `index` of `rank`, atomically.

        Raises:
            Unreachable: the rank is gone.
            RuntimeError: the window is closed.
        """
        window, scratch = self._open(), self._scratch
        new, _, old = scratch.specs
        try:
            window.Fetch_and_op(new, old, rank, index, MPI.NO_OP)
            window.Flush(rank)
        except MPI.Exception as error:
            raise Unreachable(rank) from error
        return int(scratch.old[0])

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        """Set a word to `new` if it is `expected`, atomically; return whether it was.

        Raises:
            Unreachable: the rank is gone.
            RuntimeError: the window is closed.
        """
        window, scratch = self._open(), self._scratch
        scratch.new[0] = new
        scratch.expected[0] = expected
        new_spec, expected_spec, old_spec = scratch.specs
        try:
            window.Compare_and_swap(new_spec, expected_spec, old_spec, rank, index)
            window.Flush(rank)
        except MPI.Exception as error:
            raise Unreachable(rank) from error
        return bool(scratch.old[0] == expected)

    def _open(self) -> MPI.Win:
        if self._window is None:
            raise RuntimeError("transport is closed")
        return self._window

    def close(self) -> None:
        """Free the window."""
        if self._window is not None:
            window, self._window = self._window, None
            window.Unlock_all()
            window.Free()


class WindowSlots:
    """Payload slots in a window. Creation and `close` are collective.

    Args:
        comm: communicator of all ranks.
        node: communicator of the ranks of this node.
        layout: layout of every message.
        count: number of slots per rank, of ``layout.nbytes`` bytes each.
        mode: ``auto`` shares memory within a node and uses Get and Put between nodes,
            ``shared_memory`` demands that all ranks are on one node, ``rma`` uses Get and Put
            between all ranks.

    Raises:
        UserError: if mode is ``shared_memory`` and there are several nodes.

    Attributes:
        layout: layout of every message.
        node_ranks: ranks whose slots are in place.
        transfer_mode: how payload is transferred, for users to read.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        node: MPI.Intracomm,
        layout: Layout,
        count: int,
        mode: str = "auto",
    ) -> None:
        one_node = comm.allreduce(node.size == comm.size, MPI.LAND)
        if mode == "shared_memory" and not one_node:
            raise UserError(
                "transport.mode: 'shared_memory' needs all ranks on one node, but there are "
                "several; use 'auto'"
            )
        self.layout = layout
        size = layout.nbytes * count
        self.node_ranks = [comm.rank] if mode == "rma" else node.allgather(comm.rank)
        self._shared: MPI.Win | None = None
        self._remote: MPI.Win | None = None
        memory: dict[int, Any] = {}
        if count == 0:
            pass
        elif mode == "rma":
            self._remote = MPI.Win.Allocate(size, 1, comm=comm)
            memory[comm.rank] = self._remote.tomemory()
        else:
            info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
            self._shared = MPI.Win.Allocate_shared(size, 1, info=info, comm=node)
            info.Free()
            memory = {
                rank: self._shared.Shared_query(i)[0] for i, rank in enumerate(self.node_ranks)
            }
            if not one_node:
                # The same memory in a second window, for ranks of other nodes.
                self._remote = MPI.Win.Create(memory[comm.rank], 1, comm=comm)
        for window in (self._shared, self._remote):
            if window is not None:
                window.Lock_all(MPI.MODE_NOCHECK)
        self._messages = {
            rank: [
                Message(slot, layout)
                for slot in np.frombuffer(segment, np.uint8, size).reshape(count, -1)
            ]
            for rank, segment in memory.items()
        }
        self.transfer_mode = {"rma": "Get and Put", "shared_memory": "in place"}.get(
            mode, "in place" if one_node else "in place within a node, Get and Put between nodes"
        )

    def view(self, rank: int, index: int) -> Message | None:
        """Return slot `index` of `rank` in place, or None if it is on another node."""
        messages = self._messages.get(rank)
        return None if messages is None else messages[index]

    def address(self, rank: int) -> int:
        """Return where the slots of `rank`, a rank of this node, are in this process; 0: none."""
        messages = self._messages.get(rank)
        return messages[0].buffer.ctypes.data if messages else 0

    def get(self, rank: int, index: int, out: Message) -> None:
        """Copy a slot of another node to `out`; complete on return.

        Raises:
            Unreachable: the rank is gone.
            RuntimeError: the window is closed, or the rank is on this node.
        """
        self._transfer(rank, index, out, MPI.Win.Get)

    def put(self, rank: int, index: int, message: Message) -> None:
        """Copy `message` to a slot of another node; complete at the target on return.

        Raises:
            Unreachable: the rank is gone.
            RuntimeError: the window is closed, or the rank is on this node.
        """
        self._transfer(rank, index, message, MPI.Win.Put)

    def _transfer(self, rank: int, index: int, message: Message, operation: Any) -> None:
        window, nbytes = self._remote, self.layout.nbytes
        if window is None:
            raise RuntimeError("transport is closed, or the rank is on this node")
        try:
            for start in range(0, nbytes, PIECE):
                piece = message.buffer[start : start + PIECE]
                target = (index * nbytes + start, piece.size, MPI.BYTE)
                operation(window, [piece, MPI.BYTE], rank, target)
            window.Flush(rank)
        except MPI.Exception as error:
            raise Unreachable(rank) from error

    def fence(self) -> None:
        """Order loads and stores in place before this call and those after it."""
        for window in (self._shared, self._remote):
            if window is not None:
                window.Sync()

    def close(self) -> None:
        """Free the windows."""
        self._messages.clear()
        remote, shared, self._remote, self._shared = self._remote, self._shared, None, None
        for window in (remote, shared):
            if window is not None:
                window.Unlock_all()
                window.Free()


def allocate_words(
    comm: MPI.Intracomm, node: MPI.Intracomm, count: int, mode: str
) -> NodeWords | WindowWords:
    """Allocate control words. Collective.

    They are in shared memory if all ranks are on one node, else in a window.

    Args:
        comm: communicator of all ranks.
        node: communicator of the ranks of this node.
        count: number of words per rank.
        mode: as for `WindowSlots`; ``rma`` uses a window in any case.
    """
    library = native.load()
    shared = mode != "rma" and node.size == comm.size and library is not None
    if comm.allreduce(shared, MPI.LAND):
        assert library is not None
        return NodeWords(comm, count, library)
    return WindowWords(comm, count)
