"""Operations that `bench kernel` times on the CPU: native kernels, NumPy, and roofline loops."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from mpi_dasgd.bench.kernel_workload import OPERATIONS, KernelWorkload
from mpi_dasgd.bench.timed_operation import (
    Call,
    Seconds,
    TimedOperation,
    do_nothing,
    no_baseline,
)
from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels import cpu, reference
from mpi_dasgd.kernels.encoded import BUCKET

__all__ = ["UNFUSED", "CpuTimer"]

UNFUSED = {
    "exchange": ("decode", "statistics", "difference", "move"),
    "merge_forward": ("decode", "statistics", "average", "encode"),
}
"""Operations that are also timed as separate passes over whole arrays, with these passes."""

# Bytes of float32 per element, and arrays of codes, that the separate passes read and write.
_UNFUSED_TRAFFIC = {"exchange": (32, 3), "merge_forward": (32, 2)}
# A smaller model is processed repeatedly, up to this number of elements per measured time.
_REPEATED_ELEMENTS = 1_000_000
_MAX_REPEATS = 16
# Runs of each candidate for a baseline.
_CALIBRATION_RUNS = 3
# NumPy is slow: it takes part in few rounds.
_NUMPY_ROUNDS = 5


class CpuTimer:
    """Times operations on models of one size on the CPU.

    With one thread the clock is the CPU time of that thread, which stands still while another
    program occupies its core; otherwise it is wall time.

    Args:
        elements: length of the models.
        threads: number of threads that share a model.
    """

    def __init__(self, elements: int, threads: int) -> None:
        # Carries values from one of the separate passes to the next.
        self.scratch = np.zeros(elements, np.float32)
        self.clock = time.thread_time if threads == 1 else time.perf_counter
        self.repeats = min(max(_REPEATED_ELEMENTS // max(elements, 1), 1), _MAX_REPEATS)

    def seconds(self, calls: Sequence[Call], instruction_set: str, repeats: int = 0) -> float:
        """Make some calls and return the seconds they took together.

        Args:
            calls: calls to make, in this order.
            instruction_set: instruction set of the native kernels.
            repeats: number of repetitions, over which the time is averaged; 0 for the default,
                which is larger for small models.
        """
        cpu.use_instruction_set(instruction_set)
        repeats = repeats or self.repeats
        start = self.clock()
        for _ in range(repeats):
            for call in calls:
                call()
        return (self.clock() - start) / repeats

    def memory_operations(self, workload: KernelWorkload) -> Iterator[TimedOperation]:
        """Yield memcpy and the triad of STREAM."""
        for op, roofline, traffic in (("memcpy", "copy", 8), ("triad", "triad", 12)):
            variant, run = self._fastest([roofline], workload, "sgd")
            yield TimedOperation(
                op=op,
                backend="libc" if op == "memcpy" else variant.split()[0],
                bits=0,
                elements=workload.elements,
                traffic=traffic,
                baseline="",
                baseline_variant="",
                run=run,
                run_baseline=no_baseline,
                prepare=do_nothing,
                check=do_nothing,
            )

    def codec_operations(
        self, workload: KernelWorkload, op: str, backends: Sequence[str]
    ) -> Iterator[TimedOperation]:
        """Yield a codec operation on each backend, fused and, if in `UNFUSED`, in separate passes.

        Args:
            workload: arrays in host memory.
            op: name of the operation.
            backends: instruction sets, and ``numpy``.
        """
        step = OPERATIONS[op].step(workload)
        variant, trivial = self._fastest(["trivial", "streamed"], workload, op)
        for backend in backends:
            if backend == "numpy":
                instruction_set = cpu.instruction_sets()[0]
                calls: list[Call] = [partial(reference.run, step)]
                repeats, max_rounds = 1, _NUMPY_ROUNDS
            else:
                instruction_set = backend
                calls = [cpu.prepared(step)]
                repeats, max_rounds = 0, TimedOperation.max_rounds
            once = partial(self.seconds, calls, instruction_set, 1)
            fused = partial(self.seconds, calls, instruction_set, repeats)
            yield TimedOperation(
                op=op,
                backend=backend,
                bits=workload.bits,
                elements=workload.elements,
                traffic=OPERATIONS[op].traffic(workload.bits),
                baseline="trivial",
                baseline_variant=variant,
                run=fused,
                run_baseline=trivial,
                prepare=workload.models.restore,
                check=partial(self._check_fused, workload, op, once),
                max_rounds=max_rounds,
            )
            if backend != "numpy" and op in UNFUSED:
                yield self._unfused(workload, op, backend, fused)

    def _unfused(
        self, workload: KernelWorkload, op: str, instruction_set: str, fused: Seconds
    ) -> TimedOperation:
        """Return an operation in separate passes; its baseline is the fused operation."""
        step = OPERATIONS[op].step(workload)
        encode = cpu.prepared(OPERATIONS["encode"].step(workload))
        calls = [
            encode if name == "encode" else cpu.roofline(step, name, self.scratch)
            for name in UNFUSED[op]
        ]
        float_bytes, code_arrays = _UNFUSED_TRAFFIC[op]
        once = partial(self.seconds, calls, instruction_set, 1)
        return TimedOperation(
            op=f"{op}_unfused",
            backend=instruction_set,
            bits=workload.bits,
            elements=workload.elements,
            traffic=float_bytes + code_arrays * workload.bits / 8,
            baseline="fused",
            baseline_variant=instruction_set,
            run=partial(self.seconds, calls, instruction_set),
            run_baseline=fused,
            prepare=workload.models.restore,
            check=partial(self._check_unfused, workload, op, once),
        )

    def _fastest(
        self, rooflines: Sequence[str], workload: KernelWorkload, op: str
    ) -> tuple[str, Seconds]:
        """Return the fastest of some roofline loops, over all instruction sets, and its name.

        Args:
            rooflines: names of passes in `mpi_dasgd.kernels.cpu.PASSES`.
            workload: arrays in host memory.
            op: operation whose arrays the loops pass over.
        """
        step = OPERATIONS[op].step(workload)
        candidates: dict[str, Seconds] = {
            f"{instruction_set} {name}": partial(
                self.seconds, [cpu.roofline(step, name, self.scratch)], instruction_set
            )
            for instruction_set in cpu.instruction_sets()
            for name in rooflines
        }
        order = [name for name in candidates for _ in range(_CALIBRATION_RUNS)]
        random.Random(1).shuffle(order)
        best = min((candidates[name](), name) for name in order)[1]
        return best, candidates[best]

    def _check_fused(self, workload: KernelWorkload, op: str, once: Seconds) -> None:
        if OPERATIONS[op].step(workload).partner_model is not None:
            workload.check_none_rejected()
        workload.restore()
        once()
        workload.check(OPERATIONS[op])

    def _check_unfused(self, workload: KernelWorkload, op: str, once: Seconds) -> None:
        workload.restore()
        once()
        # Separate passes sum up floating-point numbers, where the fused one has integers: of
        # their statistics only the largest distance is compared.
        workload.check(OPERATIONS[op], ignored="stats")
        distance = np.square(self.scratch[:BUCKET] - workload.models.origin[:BUCKET]).max()
        unit = np.float32(1) / np.square(workload.partner_model.scales[0])
        if workload.stats["max_d2"][0] != np.uint32(distance * unit):
            raise MpiDasgdError("the statistics of the separate passes are wrong")
