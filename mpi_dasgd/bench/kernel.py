"""`bench kernel`: the lattice codec against memory bandwidth, and fused against separate passes.

Every round runs each operation once, in random order, directly after and before its baseline. That
is a roofline loop, which reads and writes the same arrays with almost no arithmetic, on the
instruction set that does so fastest; on a GPU it is a copy of as many bytes. Other programs slow
down both, so that only the ratio is meaningful. Afterwards the results are compared with the NumPy
reference, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence

from mpi_dasgd.bench import machine
from mpi_dasgd.bench.cpu_timer import CpuTimer
from mpi_dasgd.bench.gpu_timer import GpuTimer, cuda_device
from mpi_dasgd.bench.kernel_models import Models
from mpi_dasgd.bench.kernel_report import WARM_UP, Timings, columns, gpu_lines, table
from mpi_dasgd.bench.kernel_workload import OPERATIONS, KernelWorkload
from mpi_dasgd.bench.options import add_output_options, parse_quantity, validate_names
from mpi_dasgd.bench.sample_store import samples_path, write_samples
from mpi_dasgd.bench.timed_operation import TimedOperation
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.kernels import cpu, native
from mpi_dasgd.kernels.encoded import BITS

__all__ = ["MAIN_OPERATIONS", "main"]

SIZES = ("64Ki", "25M")
FULL_SIZES = (*SIZES, "250M")
MAIN_OPERATIONS = ("encode", "apply", "exchange", "merge_forward")
"""Operations that are measured with every number of bits by default."""

# Elements up to which NumPy is measured by default.
_NUMPY_ELEMENTS = 1_000_000
# Rounds, unless given: as many as process this number of elements, within these limits.
_ROUND_ELEMENTS = 200_000_000
_MIN_ROUNDS, _MAX_ROUNDS = 5, 40
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "Ki": 2**10, "Mi": 2**20}

OpsByBits = Mapping[int, Sequence[str]]
"""Operations to measure, by the number of bits per code."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments and return the exit code.

    Raises:
        UserError: an argument is wrong, memory is short, or there are no such kernels.
        MpiDasgdError: a kernel computes something wrong.
    """
    options = _parser().parse_args(arguments)
    sizes = [_elements(size) for size in options.sizes or (FULL_SIZES if options.full else SIZES)]
    for name in ("threads", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"bench kernel: --{name} must be at least 1, got {value}")
    validate_names("bench kernel: --ops", options.ops or (), OPERATIONS)
    cupy, device = cuda_device()
    backends = _backends(options.backends, cupy is not None, device)
    ops_by_bits = _ops_by_bits(options)
    for elements in sizes:
        _require_memory(elements, ops_by_bits)
    path = samples_path("kernel", options.out)
    timings: list[Timings] = []
    load_before = machine.load_average()
    best_instruction_set = cpu.instruction_sets()[0]
    try:
        for elements in sizes:
            timings += _measure(elements, ops_by_bits, backends, options)
    finally:
        cpu.use_instruction_set(best_instruction_set)
    settings = {
        "threads": options.threads,
        "clock": "CPU time of the thread" if options.threads == 1 else "wall",
        "device": device if "cuda" in backends else "none",
        "kernels": native.status(),
        "load_before": load_before,
        "load_after": machine.load_average(),
    }
    write_samples(path, "kernel", columns(timings), settings)
    rows = [timing.summary(options.threads) for timing in timings]
    if options.json:
        print(json.dumps({**settings, "samples": str(path), "rows": rows}), flush=True)
    else:
        lines = [*table(rows, settings), *gpu_lines(rows, device), f"raw samples: {path}"]
        print("\n".join(lines), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpi-dasgd bench kernel",
        description="The lattice codec's operations against loops of the same traffic.",
    )
    parser.add_argument(
        "--sizes", nargs="+", metavar="SIZE", help=f"elements, as in 64Ki 25M [{' '.join(SIZES)}]"
    )
    parser.add_argument(
        "--bits", nargs="+", type=int, choices=BITS, help="bits per code [8; 4 and 16 for some]"
    )
    parser.add_argument(
        "--backends",
        "--backend",
        nargs="+",
        metavar="NAME",
        help="instruction sets, numpy, cuda [all available; numpy for small sizes]",
    )
    parser.add_argument(
        "--ops", nargs="+", metavar="OP", help=f"operations [{' '.join(OPERATIONS)}]"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads per vector on the CPU [1]")
    parser.add_argument("--rounds", type=int, help="runs of each operation [by the size]")
    parser.add_argument(
        "--full", action="store_true", help="add 250M, and all operations with all bits"
    )
    add_output_options(parser)
    return parser


def _elements(text: str) -> int:
    elements = parse_quantity(text, _UNITS)
    if elements < 1:
        raise UserError(
            f"bench kernel: --sizes: {text!r} is not a number of elements; expected one as in "
            "65536, 64Ki, 100k, 25M"
        )
    return elements


def _backends(names: Sequence[str] | None, has_cuda: bool, device: str) -> list[str]:
    """Return the backends to measure; without `names`, all that are available."""
    if native.load() is None:
        raise UserError(
            f"bench kernel: the roofline loops are part of what is missing: {native.status()}"
        )
    available = [*cpu.instruction_sets(), "numpy", *(["cuda"] if has_cuda else [])]
    if names is None:
        return available
    if "cuda" in names and not has_cuda:
        raise UserError(f"bench kernel: --backends: there is no CUDA device here ({device})")
    validate_names("bench kernel: --backends", names, available)
    return list(names)


def _ops_by_bits(options: argparse.Namespace) -> OpsByBits:
    ops = options.ops or list(OPERATIONS)
    is_default = not (options.full or options.bits or options.ops)
    return {
        bits: list(MAIN_OPERATIONS) if is_default and bits != 8 else ops
        for bits in options.bits or BITS
    }


def _require_memory(elements: int, ops_by_bits: OpsByBits) -> None:
    """Require that the arrays of one size fit in memory, before they are allocated."""
    # Eight float32 vectors; of each number of bits four arrays of codes.
    needed = elements * (32 + sum(ops_by_bits) / 2)
    available = machine.available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"bench kernel: {elements} elements need {needed / 1e9:.1f} GB of memory, but "
            f"{available / 1e9:.1f} GB are free; give smaller --sizes, or fewer --bits"
        )


def _measure(
    elements: int, ops_by_bits: OpsByBits, backends: Sequence[str], options: argparse.Namespace
) -> list[Timings]:
    """Measure all operations on models of one size.

    Raises:
        MpiDasgdError: a result is wrong.
        UserError: memory is short.
    """
    try:
        operations = _operations(elements, ops_by_bits, backends, options)
    # CuPy's error of the same kind is a subclass.
    except MemoryError as error:
        raise UserError(
            f"bench kernel: {elements} elements do not fit: {error}; give smaller --sizes"
        ) from error
    timings = [Timings(operation) for operation in operations]
    rounds = options.rounds or min(max(_ROUND_ELEMENTS // elements, _MIN_ROUNDS), _MAX_ROUNDS)
    shuffle = random.Random(elements).shuffle
    order = timings.copy()
    for number in range(WARM_UP + rounds):
        shuffle(order)
        for timing in order:
            if number < WARM_UP + timing.operation.max_rounds:
                timing.measure()
    for operation in operations:
        try:
            operation.check()
        except MpiDasgdError as error:
            raise MpiDasgdError(
                f"bench kernel: {operation.op} with {operation.bits} bits and {elements} elements "
                f"on {operation.backend}: {error}"
            ) from error
    return timings


def _operations(
    elements: int, ops_by_bits: OpsByBits, backends: Sequence[str], options: argparse.Namespace
) -> list[TimedOperation]:
    models = Models.make(elements)
    cpu_timer = CpuTimer(elements, options.threads)
    gpu_timer = GpuTimer(models) if "cuda" in backends else None
    cpu_backends = [name for name in backends if name not in ("numpy", "cuda")]
    if "numpy" in backends and (options.backends or elements <= _NUMPY_ELEMENTS):
        cpu_backends.append("numpy")
    operations = [] if gpu_timer is None else list(gpu_timer.memory_operations())
    for number, (bits, ops) in enumerate(ops_by_bits.items()):
        workload = KernelWorkload.make(models, bits, options.threads)
        if cpu_backends and number == 0:
            operations += cpu_timer.memory_operations(workload)
        for op in ops if cpu_backends else ():
            operations += cpu_timer.codec_operations(workload, op, cpu_backends)
        if gpu_timer is not None:
            operations += gpu_timer.codec_operations(workload, ops)
    return operations
