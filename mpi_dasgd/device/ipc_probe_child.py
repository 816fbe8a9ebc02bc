"""A process of the probe of CUDA IPC: see `mpi_dasgd.device.ipc_probe`.

It allocates, exports and opens regions as a rank does, and answers requests: lines of JSON.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mpi_dasgd.device.base import Array, Device
from mpi_dasgd.device.probe_process import ANSWER_MARK

__all__ = ["HALF", "CudaKernels", "Kernels", "main", "serve"]

HALF = 64 << 20
"""Bytes of a half of a region: the first is read by others, the second is written by them."""

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_REPETITIONS = 5  # of a copy, of which the fastest counts
_BLOCKS, _THREADS = 1056, 256
_SOURCE = r"""
__device__ unsigned word(long long i, unsigned key) {
  unsigned w = (unsigned)i * 2654435761u + key * 40503u;
  return w ^ (w >> 15);
}
extern "C" __global__ void fill(uint4* a, long long n, unsigned key) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
       i += (long long)gridDim.x * blockDim.x)
    a[i] = make_uint4(word(4 * i, key), word(4 * i + 1, key), word(4 * i + 2, key),
                      word(4 * i + 3, key));
}
extern "C" __global__ void check(const uint4* a, long long n, unsigned key,
                                 unsigned long long* wrong) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
       i += (long long)gridDim.x * blockDim.x) {
    uint4 v = a[i];
    int bad = (v.x != word(4 * i, key)) + (v.y != word(4 * i + 1, key)) +
              (v.z != word(4 * i + 2, key)) + (v.w != word(4 * i + 3, key));
    if (bad) atomicAdd(wrong, (unsigned long long)bad);
  }
}
extern "C" __global__ void copy(const uint4* a, uint4* b, long long n) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
       i += (long long)gridDim.x * blockDim.x) {
    uint4 v;  // plain loads: not through the cache for constants
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a + i));
    b[i] = v;
  }
}
"""


class Kernels(Protocol):
    """What a device does with the bytes of a probe."""

    def fill(self, array: Array, key: int) -> None:
        """Fill with words that follow from their places and `key`."""

    def wrong(self, array: Array, key: int) -> int:
        """Return how many words are not those of `key`. Waits."""

    def copy(self, source: Array, target: Array) -> float:
        """Copy; return the rate in GB/s. Waits."""


class CudaKernels:
    """Kernels of CUDA; see `Kernels`.

    Args:
        cupy: the module.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        module = cupy.RawModule(code=_SOURCE)
        self._fill, self._check, self._copy = map(module.get_function, ("fill", "check", "copy"))

    def fill(self, array: Array, key: int) -> None:
        cupy = self._cupy
        vectors = cupy.int64(array.size // 16)
        self._fill((_BLOCKS,), (_THREADS,), (array, vectors, cupy.uint32(key)))

    def wrong(self, array: Array, key: int) -> int:
        cupy = self._cupy
        count, vectors = cupy.zeros(1, cupy.uint64), cupy.int64(array.size // 16)
        self._check((_BLOCKS,), (_THREADS,), (array, vectors, cupy.uint32(key), count))
        return int(count.get()[0])

    def copy(self, source: Array, target: Array) -> float:
        cupy = self._cupy
        vectors = cupy.int64(source.size // 16)
        milliseconds = []
        for _ in range(_REPETITIONS):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            self._copy((_BLOCKS,), (_THREADS,), (source, target, vectors))
            end.record()
            end.synchronize()
            milliseconds.append(cupy.cuda.get_elapsed_time(begin, end))
        return float(source.size / min(milliseconds) / 1e6)


def serve(
    device: Device, kernels: Kernels, requests: Iterator[str], answer: Callable[[dict], None]
) -> None:
    """Answer requests until there are no more; an error is an answer, too.

    Args:
        device: device whose memory is exported, and whose kernels use that of others.
        kernels: its kernels.
        requests: lines of JSON.
        answer: takes each answer.
    """
    own = device.allocate(2 * HALF)
    opened: dict[str, Any] = {}

    def open_region(handle: str) -> Any:
        if handle not in opened:  # a region is opened once in a process
            opened[handle] = device.open_region(bytes.fromhex(handle), 2 * HALF)
        return opened[handle].array

    def start(key: int) -> dict:
        kernels.fill(own.array[:HALF], key)
        kernels.wrong(own.array[:HALF], key)  # waits
        return {"handle": own.export().hex()}

    def use(handle: str, read_key: int, write_key: int) -> dict:
        theirs = open_region(handle)
        private = device.allocate(HALF)
        mine = private.array
        read = kernels.copy(theirs[:HALF], mine)
        wrong = kernels.wrong(mine, read_key) + kernels.wrong(theirs[:HALF], read_key)
        kernels.fill(mine, write_key)
        write = kernels.copy(mine, theirs[HALF:])
        local = kernels.copy(mine, own.array[HALF:])
        device.close()
        opened.pop(handle).close()
        private.close()
        return {"wrong": wrong, "read": read, "write": write, "local": local}

    def check(key: int) -> dict:
        return {"wrong": kernels.wrong(own.array[HALF:], key)}

    def keep_open(handle: str) -> dict:
        open_region(handle)
        return {}

    def read(key: int) -> dict:
        (region,) = opened.values()
        return {"wrong": kernels.wrong(region.array[:HALF], key)}

    actions: dict[str, Callable[..., dict]] = {
        "start": start,
        "use": use,
        "check": check,
        "open": keep_open,
        "read": read,
    }
    for line in requests:
        request = json.loads(line)
        try:
            answer(actions[request.pop("do")](**request))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    device.close()


def main(index: int, bus_id: str) -> int:
    """Serve as a process on GPU `index`, which must have PCI bus id `bus_id` if that is not ""."""
    _die_with_parent()

    def answer(values: dict) -> None:
        print(ANSWER_MARK + json.dumps(values), flush=True)

    try:
        from mpi_dasgd.device.cuda import CudaDevice

        device = CudaDevice(index)
        seen = str(device.xp.cuda.runtime.deviceGetPCIBusId(index))
        if bus_id and seen.lower() != bus_id.lower():
            raise RuntimeError(f"number {index} is another GPU here, {seen}")
        kernels = CudaKernels(device.xp)
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    serve(device, kernels, sys.stdin, answer)
    return 0


def _die_with_parent() -> None:
    """Have the kernel end this process, whatever it does, when its parent has ended."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
