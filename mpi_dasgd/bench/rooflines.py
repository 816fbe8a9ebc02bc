"""What `bench kernel` times, operation and yardstick side by side: on the CPU, in NumPy, on a GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpi_dasgd.bench.kernel_workload import OPERATIONS, KernelWorkload, Models
from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels import cpu, lattice, reference
from mpi_dasgd.kernels.encoded import BUCKET

__all__ = ["UNFUSED", "Cpu", "Gpu", "Lane", "cuda_device"]

UNFUSED = {
    "exchange": ("decode", "statistics", "difference", "move"),
    "merge_forward": ("decode", "statistics", "average", "encode"),
}
"""The operations that are also done in separate passes over whole arrays."""

_UNFUSED_BYTES = {"exchange": (32, 3), "merge_forward": (32, 2)}  # of float32; arrays of codes
_REPEATED = 1_000_000  # elements for each time that is taken, if the model is smaller
_REPEATS = 16  # at most
_CALIBRATION = 3  # times that each candidate for a yardstick is tried

Call = Callable[[], None]
Seconds = Callable[[], float]


@dataclass
class Lane:
    """One operation on one backend, and what it is measured against.

    Attributes:
        op, backend, bits: what is done; 0 bits: no codes.
        elements: of the model.
        traffic: bytes read and written, an element.
        against: name of the yardstick: ``trivial``, ``fused``, or empty for none.
        how: which of the yardsticks of this name was fastest.
        run: does it and returns the seconds that one time took.
        yardstick: does the yardstick and returns its seconds.
        prepare: what to do before, without taking the time.
        check: does it once more and compares the result with the reference.
        rounds: in which it takes part at most.
    """

    op: str
    backend: str
    bits: int
    elements: int
    traffic: float
    against: str
    how: str
    run: Seconds
    yardstick: Seconds
    prepare: Call
    check: Call
    rounds: int = 10**9


def _nothing() -> None:
    pass


def _none() -> float:
    return float("nan")


class Cpu:
    """The lanes of one size on the CPU.

    One thread is timed by the time that it has run: while another program has its core, it stands still.

    Args:
        elements: of the model.
        threads: that share it.
    """

    def __init__(self, elements: int, threads: int) -> None:
        self.scratch = np.zeros(elements, np.float32)  # from one pass to the next
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.repeats = min(max(_REPEATED // max(elements, 1), 1), _REPEATS)

    def seconds(self, calls: Sequence[Call], instruction_set: str, repeats: int = 0) -> float:
        """Make these calls, several times for a small model, and return the seconds of one time."""
        cpu.use_instruction_set(instruction_set)
        repeats = repeats or self.repeats
        start = self.clock()
        for _ in range(repeats):
            for call in calls:
                call()
        return (self.clock() - start) / repeats

    def memory(self, work: KernelWorkload) -> Iterator[Lane]:
        """Yield memcpy and a triad, as in STREAM."""
        for op, name, traffic in (("memcpy", "copy", 8), ("triad", "triad", 12)):
            how, run = self._fastest([name], work, "sgd_encode")
            backend = "libc" if op == "memcpy" else how.split()[0]
            yield Lane(
                op, backend, 0, work.elements, traffic, "", "", run, _none, _nothing, _nothing
            )

    def lanes(self, work: KernelWorkload, op: str, backends: Sequence[str]) -> Iterator[Lane]:
        """Yield an operation on some instruction sets, or in NumPy, and its separate passes."""
        operation = OPERATIONS[op]
        traffic = operation.traffic(work.bits)
        step = operation.step(work)
        how, trivial = self._fastest(["trivial", "streamed"], work, op)
        best = cpu.instruction_sets()[0]

        def lane(name: str, backend: str, calls: Sequence[Call], yardstick: Seconds) -> Lane:
            fused = name == op
            isa = best if backend == "numpy" else backend
            once = partial(self.seconds, calls, isa, 1)
            return Lane(
                name, backend, work.bits, work.elements,
                traffic if fused else _traffic(op, work.bits),
                "trivial" if fused else "fused", how if fused else backend,
                once if backend == "numpy" else partial(self.seconds, calls, isa), yardstick,
                work.models.restore, partial(self._check, work, op, once, fused),
                5 if backend == "numpy" else 10**9,
            )  # fmt: skip

        for backend in backends:
            if backend == "numpy":
                yield lane(op, backend, [partial(reference.run, step)], trivial)
                continue
            one_pass = [cpu.prepared(step)]
            yield lane(op, backend, one_pass, trivial)
            if op in UNFUSED:
                fused = partial(self.seconds, one_pass, backend)
                yield lane(f"{op}_unfused", backend, self._passes(work, op), fused)

    def _passes(self, work: KernelWorkload, op: str) -> list[Call]:
        step = OPERATIONS[op].step(work)
        encode = cpu.prepared(OPERATIONS["encode"].step(work))
        return [
            encode if name == "encode" else cpu.roofline(step, name, self.scratch)
            for name in UNFUSED[op]
        ]

    def _fastest(self, names: Sequence[str], work: KernelWorkload, op: str) -> tuple[str, Seconds]:
        """Return the fastest of some passes over the arrays of an operation, and its name."""
        step = OPERATIONS[op].step(work)
        candidates: dict[str, Seconds] = {
            f"{instruction_set} {name}": partial(
                self.seconds, [cpu.roofline(step, name, self.scratch)], instruction_set
            )
            for instruction_set in cpu.instruction_sets()
            for name in names
        }
        order = [name for name in candidates for _ in range(_CALIBRATION)]
        random.Random(1).shuffle(order)
        best = min((candidates[name](), name) for name in order)[1]
        return best, candidates[best]

    def _check(self, work: KernelWorkload, op: str, once: Seconds, fused: bool) -> None:
        step = OPERATIONS[op].step(work)
        if step.partner_model is not None and fused:
            work.check_sound()
        work.restore()
        once()
        work.check(OPERATIONS[op], without="" if fused else "stats")
        if not fused:  # their statistics are of floating point numbers
            distance = np.square(self.scratch[:BUCKET] - work.models.origin[:BUCKET]).max()
            unit = np.float32(1) / np.square(work.partner_model.scales[0])
            if work.stats["max_d2"][0] != np.uint32(distance * unit):
                raise MpiDasgdError("the statistics of the separate passes are wrong")


def _traffic(op: str, bits: int) -> float:
    floats, codes = _UNFUSED_BYTES[op]
    return floats + codes * bits / 8


class Gpu:
    """The lanes of one size on the current CUDA device; the yardstick is a copy of the same traffic.

    Operations go from one set of arrays to the next, so that each finds the L2 cache full of others.
    While they are put on the stream the device is kept busy, so that it does not wait for Python.
    """

    _PLUG = 1 << 28  # bytes of a copy that keeps the device busy
    _LAUNCHES = 8  # at least, for each time that is taken
    _MOST_SETS = 256

    def __init__(self, models: Models) -> None:
        import cupy

        self.cupy, self.host = cupy, models
        self.elements = models.origin.size
        self.cache = int(cupy.cuda.Device().attributes["L2CacheSize"])
        most = max(op.traffic(16) for op in OPERATIONS.values()) / 2
        self.pool_bytes = max(4 * self.cache, int(self.elements * most), self._PLUG)
        self.pools = [cupy.cuda.alloc(self.pool_bytes) for _ in range(2)]
        self.models: list[Models] = []  # sets of them
        self.plugs = 4

    def seconds(self, launches: Sequence[Call]) -> float:
        """Put these on the stream and return the seconds of each, in the mean."""
        begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        while True:
            for _ in range(self.plugs):
                self._copy(0, self._PLUG)
            begin.record()
            for launch in launches:
                launch()
            waited = begin.done
            end.record()
            end.synchronize()
            if not waited or self.plugs >= 256:
                elapsed: float = self.cupy.cuda.get_elapsed_time(begin, end)
                return elapsed / 1e3 / len(launches)
            self.plugs *= 2

    def memory(self) -> Iterator[Lane]:
        """Yield a copy from device memory to device memory."""
        run = partial(self.seconds, self._copies(8 * self.elements))
        yield Lane("memcpy", "cuda", 0, self.elements, 8, "", "", run, _none, _nothing, _nothing)

    def lanes(self, work: KernelWorkload, ops: Sequence[str]) -> Iterator[Lane]:
        """Yield operations; `work` lies in host memory."""
        sets = [self._sets(OPERATIONS[op].traffic(work.bits) * self.elements) for op in ops]
        while len(self.models) < max(sets):
            models = Models(self.host.origin, self.host.host_gradient, self.cupy)
            self.models.append(models)
        works = [work.on(models) for models in self.models]
        for op, count in zip(ops, sets, strict=True):
            traffic = OPERATIONS[op].traffic(work.bits)
            steps = [OPERATIONS[op].step(each) for each in works[:count]]
            launches: list[Call] = [
                partial(lattice.backend_of(step.x).run, step)
                for step in (steps * self._LAUNCHES)[: max(count, self._LAUNCHES)]
            ]
            yield Lane(
                op, "cuda", work.bits, self.elements, traffic, "trivial", "copy",
                partial(self.seconds, launches),
                partial(self.seconds, self._copies(traffic * self.elements)),
                self._restore, partial(self._check, works[0], op, launches[0]),
            )  # fmt: skip

    def _restore(self) -> None:
        for models in self.models:
            models.restore()

    def _sets(self, nbytes: float) -> int:
        """How many sets of so many bytes are twice as large as the L2 cache, and at least 2."""
        return min(max(int(2 * self.cache / nbytes) + 1, 2), self._MOST_SETS)

    def _copies(self, nbytes: float) -> list[Call]:
        """Return copies that read and write so many bytes, from changing places."""
        half = max(int(nbytes / 2), 1)
        places = max(self.pool_bytes // half, 1)
        count = max(self._sets(nbytes), self._LAUNCHES)
        return [partial(self._copy, i % places * half, half) for i in range(count)]

    def _copy(self, offset: int, nbytes: int) -> None:
        to, source = (pool + offset for pool in self.pools)
        to.copy_from_device_async(source, nbytes)

    def _check(self, work: KernelWorkload, op: str, launch: Call) -> None:
        step = OPERATIONS[op].step(work)
        if step.partner_model is not None:
            work.check_sound()
        work.restore()
        launch()
        work.check(OPERATIONS[op])


def cuda_device() -> tuple[Any, str]:
    """Return CuPy if there is a device for it, and in words what is there or why there is none."""
    try:
        import cupy
    except ImportError:
        return None, "CuPy is not installed: pip install 'mpi_dasgd[cuda13]', or cuda12"
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return None, f"CuPy finds none: {error}"
    return cupy, properties["name"].decode()
