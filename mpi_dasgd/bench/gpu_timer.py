"""Operations that `bench kernel` times on a GPU, beside copies of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mpi_dasgd.bench.kernel_models import Models
from mpi_dasgd.bench.kernel_workload import OPERATIONS, KernelWorkload
from mpi_dasgd.bench.timed_operation import Call, TimedOperation, do_nothing, no_baseline
from mpi_dasgd.kernels import lattice

__all__ = ["GpuTimer", "cuda_device"]


class GpuTimer:
    """Times operations on models of one size on the current CUDA device.

    The baseline is a copy of as many bytes. Successive launches use different sets of arrays, so
    that each finds the L2 cache full of other data. Copies keep the device busy while launches
    are enqueued, so that it does not wait for Python.

    Args:
        models: models in host memory.
    """

    # Bytes of a copy that keeps the device busy.
    _BUSY_BYTES = 1 << 28
    # Launches per measured time, at least.
    _MIN_LAUNCHES = 8
    _MAX_SETS = 256
    # Copies in front of the measured launches, at most.
    _MAX_BUSY_COPIES = 256

    def __init__(self, models: Models) -> None:
        import cupy

        self.cupy, self.host_models = cupy, models
        self.elements = models.origin.size
        self.cache_bytes = int(cupy.cuda.Device().attributes["L2CacheSize"])
        traffic = max(op.traffic(16) for op in OPERATIONS.values())
        self.pool_bytes = max(
            4 * self.cache_bytes, int(self.elements * traffic / 2), self._BUSY_BYTES
        )
        self.pools = [cupy.cuda.alloc(self.pool_bytes) for _ in range(2)]
        self.model_sets: list[Models] = []
        self.busy_copies = 4

    def seconds(self, launches: Sequence[Call]) -> float:
        """Enqueue launches on the stream and return the mean seconds per launch."""
        begin, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        while True:
            for _ in range(self.busy_copies):
                self._copy(0, self._BUSY_BYTES)
            begin.record()
            for launch in launches:
                launch()
            # Whether the device reached the launches before all of them were enqueued.
            was_idle = begin.done
            end.record()
            end.synchronize()
            if not was_idle or self.busy_copies >= self._MAX_BUSY_COPIES:
                elapsed_ms: float = self.cupy.cuda.get_elapsed_time(begin, end)
                return elapsed_ms / 1e3 / len(launches)
            self.busy_copies *= 2

    def memory_operations(self) -> Iterator[TimedOperation]:
        """Yield a copy from device memory to device memory."""
        yield TimedOperation(
            op="memcpy",
            backend="cuda",
            bits=0,
            elements=self.elements,
            traffic=8,
            baseline="",
            baseline_variant="",
            run=partial(self.seconds, self._copies(8 * self.elements)),
            run_baseline=no_baseline,
            prepare=do_nothing,
            check=do_nothing,
        )

    def codec_operations(
        self, workload: KernelWorkload, ops: Sequence[str]
    ) -> Iterator[TimedOperation]:
        """Yield codec operations.

        Args:
            workload: arrays in host memory.
            ops: names of the operations.
        """
        traffics = [OPERATIONS[op].traffic(workload.bits) for op in ops]
        counts = [self._set_count(traffic * self.elements) for traffic in traffics]
        while len(self.model_sets) < max(counts):
            self.model_sets.append(
                Models(self.host_models.origin, self.host_models.host_gradient, self.cupy)
            )
        workloads = [workload.on(models) for models in self.model_sets]
        for op, traffic, count in zip(ops, traffics, counts, strict=True):
            steps = [OPERATIONS[op].step(on_device) for on_device in workloads[:count]]
            launches: list[Call] = [
                partial(lattice.backend_of(step.x).run, step)
                for step in (steps * self._MIN_LAUNCHES)[: max(count, self._MIN_LAUNCHES)]
            ]
            yield TimedOperation(
                op=op,
                backend="cuda",
                bits=workload.bits,
                elements=self.elements,
                traffic=traffic,
                baseline="trivial",
                baseline_variant="copy",
                run=partial(self.seconds, launches),
                run_baseline=partial(self.seconds, self._copies(traffic * self.elements)),
                prepare=self._restore,
                check=partial(_check, workloads[0], op, launches[0]),
            )

    def _restore(self) -> None:
        for models in self.model_sets:
            models.restore()

    def _set_count(self, nbytes: float) -> int:
        """Return how many sets of `nbytes` bytes exceed twice the L2 cache, at least 2."""
        return min(max(int(2 * self.cache_bytes / nbytes) + 1, 2), self._MAX_SETS)

    def _copies(self, nbytes: float) -> list[Call]:
        """Return copies that read and write `nbytes` bytes together, from changing addresses."""
        half = max(int(nbytes / 2), 1)
        places = max(self.pool_bytes // half, 1)
        count = max(self._set_count(nbytes), self._MIN_LAUNCHES)
        return [partial(self._copy, i % places * half, half) for i in range(count)]

    def _copy(self, offset: int, nbytes: int) -> None:
        destination, source = (pool + offset for pool in self.pools)
        destination.copy_from_device_async(source, nbytes)


def _check(workload: KernelWorkload, op: str, launch: Call) -> None:
    if OPERATIONS[op].step(workload).partner_model is not None:
        workload.check_none_rejected()
    workload.restore()
    launch()
    workload.check(OPERATIONS[op])


def cuda_device() -> tuple[Any, str]:
    """Return CuPy and the name of its device, or None and the reason why there is none."""
    try:
        import cupy
    except ImportError:
        return None, "CuPy is not installed: pip install 'mpi_dasgd[cuda13]', or cuda12"
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return None, f"CuPy finds none: {error}"
    return cupy, properties["name"].decode()
