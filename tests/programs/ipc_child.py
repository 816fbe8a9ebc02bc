"""A process of the probe of CUDA IPC on the host: the real requests and regions, kernels of NumPy.

    ipc_child.py MODE FOLDER INDEX BUS_ID

What it does wrong is its mode; "good" is nothing.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpi_dasgd.device import ipc_probe_child
from mpi_dasgd.device.probe_process import ANSWER_MARK

ipc_probe_child.HALF = 1 << 16
_numbers = itertools.count()


class SharedFile:
    """A region in a file: see `Region`."""

    def __init__(self, path: Path, nbytes: int, *, is_owner: bool) -> None:
        self._path, self._is_owner = path, is_owner
        with path.open("r+b") as file:
            self.array = np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)

    def export(self) -> bytes:
        return str(self._path).encode()

    def close(self) -> None:
        if self._is_owner:
            self._path.unlink()


class SharedFiles:
    """What `serve` needs of a `Device`, on files in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def allocate(self, nbytes: int) -> SharedFile:
        path = Path(self._folder, f"{os.getpid()}-{next(_numbers)}")
        path.write_bytes(bytes(nbytes))
        return SharedFile(path, nbytes, is_owner=True)

    def open_region(self, handle: bytes, nbytes: int) -> SharedFile:
        return SharedFile(Path(handle.decode()), nbytes, is_owner=False)

    def close(self) -> None:
        """All work is done."""


class HostKernels:
    """Kernels of the probe, in NumPy."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def _words(self, nbytes: int, key: int) -> np.ndarray:
        words = np.arange(nbytes // 4, dtype=np.uint32) * np.uint32(2654435761)
        return words + np.uint32(key % 2**32)

    def fill(self, array: np.ndarray, key: int) -> None:
        array.view(np.uint32)[:] = self._words(array.size, key)

    def wrong(self, array: np.ndarray, key: int) -> int:
        return int((array.view(np.uint32) != self._words(array.size, key)).sum())

    def copy(self, source: np.ndarray, target: np.ndarray) -> float:
        target[:] = source
        if self._mode == "wrong bytes":
            target[-1] ^= 1
        if self._mode == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._mode == "hang":
            time.sleep(1000)
        if self._mode == "raise":
            raise RuntimeError("cudaIpcOpenMemHandle: invalid argument")
        return 40.0 if self._mode == "slow" else 1000.0


def _serve_on_fake_cuda(folder: str, index: int, bus_id: str) -> int:
    """Run the real process, on a CUDA of host memory: every line but the kernels."""
    from tests.support.fake_cuda import FakeCuda

    fake = FakeCuda(Path(folder, "libcuda.so.1"))
    kernels = HostKernels("good")

    def check(array: np.ndarray, vectors: int, key: int, wrong: np.ndarray) -> None:
        assert array.size == 16 * vectors
        wrong[0] += kernels.wrong(array, int(key))

    functions: dict[str, Any] = {
        "fill": lambda array, vectors, key: kernels.fill(array, int(key)),
        "check": check,
        "copy": lambda source, target, vectors: kernels.copy(source, target),
    }

    def compiled(code: str) -> Any:
        def function(name: str) -> Any:
            assert f'extern "C" __global__ void {name}(' in code
            return lambda grid, block, arguments: functions[name](*arguments)

        return SimpleNamespace(get_function=function)

    fake.RawModule = compiled
    fake.cuda.Event = lambda: SimpleNamespace(record=int, synchronize=int)
    fake.cuda.get_elapsed_time = lambda begin, end: 1e-3
    fake.runtime.deviceGetPCIBusId = lambda number: f"0000:0{number + 1}:00.0"
    with fake.installed():
        return ipc_probe_child.main(index, bus_id)


def _answer(values: dict) -> None:
    print("a library says something", ANSWER_MARK + json.dumps(values), sep="\n", flush=True)


def main(mode: str, folder: str, index: str, bus_id: str) -> None:
    if mode == "exit":
        sys.exit("ImportError: no module named 'cupy'")
    if mode == "garbage":
        print("{garbage", ANSWER_MARK + "{garbage", ANSWER_MARK + "[]", sep="\n", flush=True)
        sys.exit(0)
    if mode == "cuda":
        sys.exit(_serve_on_fake_cuda(folder, int(index), bus_id))
    while mode == "flood":
        print("more")
    if mode == "silent":
        time.sleep(1000)
    if mode == "nonsense":
        for _ in sys.stdin:
            _answer({"handle": "00", "wrong": "many"})
    device: Any = SharedFiles(folder)
    ipc_probe_child.serve(device, HostKernels(mode), sys.stdin, _answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
