"""Canary for windows on memory of GPUs: real Put, Get and Flush, with every byte verified.

    mpiexec -n 2 python -m mpi_dasgd.doctor.windows cuda|host MEBIBYTES

An MPI library that does not know GPUs treats their memory as the host's, and crashes; one that does
may still deliver wrong bytes. So this is a program of its own, to be run under the library in
question. Its last line is ``WINDOW ok ...`` or ``WINDOW WRONG BYTES ...``, its exit code 0 or 3.
Nothing of this package puts a window on memory of a GPU so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["main"]

_TURNS = 5


class _Memory(Protocol):
    """Memory on which a window may be.

    Attributes:
        xp: array module, NumPy or CuPy.
    """

    xp: Any

    def allocate(self, nbytes: int) -> Any:
        """Return an array, uint8, (nbytes,), of an allocation of its own."""

    def address(self, array: Any) -> int:
        """Return where an array is."""

    def wait(self) -> None:
        """Wait until all work on arrays is done."""


class _HostMemory:
    """Memory of the host."""

    xp: Any = np

    def allocate(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def wait(self) -> None:
        pass


class _CudaMemory:
    """Memory of the first GPU. To be made before MPI starts, which looks for a current device."""

    def __init__(self) -> None:
        import cupy

        self.xp: Any = cupy
        cupy.cuda.Device(0).use()
        cupy.zeros(1)

    def allocate(self, nbytes: int) -> Any:
        cuda = self.xp.cuda
        address = cuda.runtime.malloc(nbytes)  # not of a pool: that cannot be exported
        memory = cuda.UnownedMemory(address, nbytes, None, 0)
        return self.xp.ndarray(nbytes, self.xp.uint8, cuda.MemoryPointer(memory, 0))

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def wait(self) -> None:
        self.xp.cuda.runtime.deviceSynchronize()


def _pattern(xp: Any, nbytes: int, rank: int, turn: int) -> Any:
    """Return the bytes that a rank writes in a turn: others than all before."""
    factor = xp.uint32(2654435761 + 2 * rank + 64 * turn)
    return (xp.arange(nbytes, dtype=xp.uint32) * factor >> xp.uint32(13)).astype(xp.uint8)


def main(arguments: Sequence[str]) -> int:
    """Run as one rank; return 0 if all bytes of all ranks were right, else 3."""
    kind, nbytes = arguments[0], int(arguments[1]) << 20
    memory: _Memory = _CudaMemory() if kind == "cuda" else _HostMemory()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    own, scratch = memory.allocate(2 * nbytes), memory.allocate(nbytes)
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    info = MPI.Info.Create({"mpi_memory_alloc_kinds": "cuda:device"} if kind == "cuda" else {})
    window = MPI.Win.Create(_buffer(memory, own), 1, info=info, comm=comm)
    info.Free()
    window.Lock_all(MPI.MODE_NOCHECK)
    wrong, seconds = _exchange(comm, window, memory, own, scratch)
    window.Unlock_all()
    window.Free()
    total = int(comm.allreduce(wrong))
    if comm.rank == 0:
        rates = ", ".join(f"{name} {nbytes / s / 1e9:.2f} GB/s" for name, s in seconds.items())
        verdict = "WRONG BYTES" if total else "ok"
        print(f"WINDOW {verdict}: {kind} memory, {rates}; {library}", flush=True)
    return 3 if total else 0


def _buffer(memory: _Memory, array: Any) -> Any:
    from mpi4py import MPI

    return MPI.buffer.fromaddress(memory.address(array), array.nbytes)


def _exchange(
    comm: Any, window: Any, memory: _Memory, own: Any, scratch: Any
) -> tuple[int, dict[str, float]]:
    """Get from and Put to the next rank. Collective.

    Returns:
        Transfers that brought wrong bytes, and the shortest seconds of each kind.
    """
    from mpi4py import MPI

    xp, nbytes, rank, other = memory.xp, scratch.nbytes, comm.rank, (comm.rank + 1) % comm.size
    previous = (comm.rank - 1) % comm.size
    operations = {"get": window.Get, "put": window.Put}
    seconds = dict.fromkeys(operations, float("inf"))
    wrong = 0

    def transfer(name: str, offset: int) -> None:
        begun = time.perf_counter()
        target = (offset, nbytes, MPI.BYTE)
        operations[name]([_buffer(memory, scratch), MPI.BYTE], other, target)
        window.Flush(other)
        seconds[name] = min(seconds[name], time.perf_counter() - begun)

    for turn in range(_TURNS):
        own[:nbytes] = _pattern(xp, nbytes, rank, turn)  # its first half is read, the other written
        memory.wait()
        window.Sync()
        comm.Barrier()
        transfer("get", 0)
        wrong += not bool((scratch == _pattern(xp, nbytes, other, turn)).all())
        scratch[:] = _pattern(xp, nbytes, 16 + rank, turn)
        memory.wait()
        transfer("put", nbytes)
        comm.Barrier()
        window.Sync()
        wrong += not bool((own[nbytes:] == _pattern(xp, nbytes, 16 + previous, turn)).all())
        comm.Barrier()
    return wrong, seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
