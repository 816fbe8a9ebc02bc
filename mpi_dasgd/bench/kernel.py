"""`bench kernel`: the lattice codec against memory, and fused against separate passes.

In every round each operation is done once, in random order, directly after and before its yardstick: a
loop that reads and writes the same arrays with next to no arithmetic, of the instruction set that does that
fastest; on a GPU a copy of as many bytes. Other programs slow down both, so that the ratio is what to
read. Afterwards the results are compared with the NumPy reference, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpi_dasgd.bench import machine
from mpi_dasgd.bench.kernel_workload import OPERATIONS, KernelWorkload, Models
from mpi_dasgd.bench.rooflines import Cpu, Gpu, Lane, cuda_device
from mpi_dasgd.bench.sample_store import DIRECTORY, quartiles, samples_path, write_samples
from mpi_dasgd.errors import MpiDasgdError, UserError, nearest
from mpi_dasgd.kernels import cpu, native
from mpi_dasgd.kernels.encoded import BITS

__all__ = ["main"]

SIZES = ("64Ki", "25M")
FULL = (*SIZES, "250M")
MAIN = ("encode", "apply", "exchange", "merge_forward")  # with every number of bits
WARM_UP = 1  # rounds; before them, yardsticks are tried on the same arrays

_SMALL = 1_000_000  # elements up to which NumPy takes part
_ROUNDS = (5, 40)  # at least and at most, unless told otherwise
_ROUND_ELEMENTS = 200_000_000  # what they would have in between
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "Ki": 2**10, "Mi": 2**20}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark.

    Raises:
        UserError: an argument is wrong, memory is short, or there are no such kernels.
        MpiDasgdError: a kernel computes something wrong.
    """
    options = _parser().parse_args(arguments)
    sizes = [_elements(size) for size in options.sizes or (FULL if options.full else SIZES)]
    for name in ("threads", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"bench kernel: --{name} must be at least 1, got {value}")
    ops = options.ops or list(OPERATIONS)
    _known("--ops", ops, OPERATIONS)
    cupy, device = cuda_device()
    backends = _backends(options.backends, cupy is not None, device)
    work = dict.fromkeys(options.bits or BITS, ops)
    if not (options.full or options.bits or options.ops):
        work |= {bits: list(MAIN) for bits in work if bits != 8}
    for elements in sizes:
        _check_memory(elements, work)
    path = samples_path("kernel", options.out)
    cases: list[_Case] = []
    begin = machine.load()
    best = cpu.instruction_sets()[0]
    try:
        for elements in sizes:
            cases += _measure(elements, work, backends, options)
    finally:
        cpu.use_instruction_set(best)
    settings = {
        "threads": options.threads,
        "clock": "CPU time of the thread" if options.threads == 1 else "wall",
        "device": device if "cuda" in backends else "none",
        "kernels": native.status(),
        "load_before": begin,
        "load_after": machine.load(),
    }
    write_samples(path, "kernel", _columns(cases), settings)
    rows = [case.row(options.threads) for case in cases]
    if options.json:
        print(json.dumps({**settings, "samples": str(path), "rows": rows}), flush=True)
    else:
        print("\n".join([*_table(rows, settings), f"raw samples: {path}"]), flush=True)
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
        "--bits", nargs="+", type=int, choices=BITS, help="of the codes [8; 4 and 16 for some]"
    )
    parser.add_argument(
        "--backends",
        "--backend",
        nargs="+",
        metavar="NAME",
        help="instruction sets, numpy, cuda [what there is; numpy for small sizes]",
    )
    parser.add_argument(
        "--ops", nargs="+", metavar="OP", help=f"operations [{' '.join(OPERATIONS)}]"
    )
    parser.add_argument("--threads", type=int, default=1, help="that share a vector on the CPU [1]")
    parser.add_argument("--rounds", type=int, help="of all operations [by the size]")
    parser.add_argument("--full", action="store_true", help="add 250M, and all widths of all")
    parser.add_argument("--out", metavar="DIR", help=f"directory for the raw samples [{DIRECTORY}]")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    return parser


def _elements(text: str) -> int:
    match = re.fullmatch(r"(\d+)([A-Za-z]*)", text)
    size = int(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if size < 1:
        raise UserError(
            f"bench kernel: --sizes: {text!r} is not a number of elements; expected one as in "
            "65536, 64Ki, 100k, 25M"
        )
    return size


def _known(option: str, names: Iterable[str], valid: Iterable[str]) -> None:
    for name in names:
        if name not in valid:
            raise UserError(
                f"bench kernel: {option}: {name!r} is not known{nearest(name, valid)} "
                f"(valid: {', '.join(valid)})"
            )


def _backends(names: Sequence[str] | None, cuda: bool, device: str) -> list[str]:
    """Return the backends to measure; without `names`, all that there are."""
    if native.load() is None:
        raise UserError(
            f"bench kernel: the yardsticks are part of what is missing: {native.status()}"
        )
    there = [*cpu.instruction_sets(), "numpy", *(["cuda"] if cuda else [])]
    if names is None:
        return there
    if "cuda" in names and not cuda:
        raise UserError(f"bench kernel: --backends: there is no CUDA device here ({device})")
    _known("--backends", names, there)
    return list(names)


def _check_memory(elements: int, work: dict[int, list[str]]) -> None:
    """Refuse sizes that would bring the machine to its knees."""
    needed = elements * (28 + sum(work) / 2)  # 7 vectors of float32, 4 of codes
    free = machine.available_memory()
    if free is not None and needed > free:
        raise UserError(
            f"bench kernel: {elements} elements need {needed / 1e9:.1f} GB of memory, but "
            f"{free / 1e9:.1f} GB are free; give smaller --sizes, or fewer --bits"
        )


@dataclass
class _Case:
    """One lane and its samples: in the order of the rounds, warm-up first."""

    lane: Lane
    seconds: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)  # of the yardstick
    after: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Add one sample."""
        lane = self.lane
        lane.prepare()
        self.before.append(lane.yardstick())
        self.seconds.append(lane.run())
        self.after.append(lane.yardstick())

    def row(self, threads: int) -> dict[str, Any]:
        """Figures of all rounds but those for warming up."""
        lane = self.lane
        seconds, before, after = (
            np.array(values[WARM_UP:]) for values in (self.seconds, self.before, self.after)
        )
        q1, median, q3 = quartiles(seconds * 1e3)
        row = {
            "op": lane.op,
            "backend": lane.backend,
            "bits": lane.bits,
            "elements": lane.elements,
            "threads": threads,
            "bytes_per_element": lane.traffic,
            "samples": seconds.size,
            "q1_ms": q1,
            "median_ms": median,
            "q3_ms": q3,
            "min_ms": seconds.min() * 1e3,
            "gb_per_s": lane.elements * lane.traffic / median / 1e6,
            "yardstick": lane.how,
            "ratio_to_trivial": None,
            "ratio_to_fused": None,
        }
        if lane.against:
            ratios = quartiles(seconds / ((before + after) / 2))
            yardstick = np.concatenate([before, after])
            row[f"ratio_to_{lane.against}"] = ratios.median
            row["ratio_q1"], row["ratio_q3"] = ratios.q1, ratios.q3
            row["ratio_of_min"] = seconds.min() / yardstick.min()
            row["yardstick_median_ms"] = float(np.median(yardstick)) * 1e3
            row["yardstick_min_ms"] = yardstick.min() * 1e3
            if lane.backend == "cuda":
                row["percent_of_copy"] = 100 / ratios.median
        return row


def _measure(
    elements: int, work: dict[int, list[str]], backends: Sequence[str], options: argparse.Namespace
) -> list[_Case]:
    """Measure all operations with one size.

    Raises:
        MpiDasgdError: a result is wrong.
        UserError: memory is short.
    """
    try:
        cases = [_Case(lane) for lane in _lanes(elements, work, backends, options)]
    except MemoryError as error:  # CuPy's is one
        raise UserError(
            f"bench kernel: {elements} elements do not fit: {error}; give smaller --sizes"
        ) from error
    least, most = _ROUNDS
    rounds = options.rounds or min(max(_ROUND_ELEMENTS // elements, least), most)
    shuffle = random.Random(elements).shuffle
    order = cases.copy()
    for number in range(WARM_UP + rounds):
        shuffle(order)
        for case in order:
            if number < WARM_UP + case.lane.rounds:
                case.measure()
    for case in cases:
        lane = case.lane
        try:
            lane.check()
        except MpiDasgdError as error:
            raise MpiDasgdError(
                f"bench kernel: {lane.op} with {lane.bits} bits and {elements} elements on "
                f"{lane.backend}: {error}"
            ) from error
    return cases


def _lanes(
    elements: int, work: dict[int, list[str]], backends: Sequence[str], options: argparse.Namespace
) -> list[Lane]:
    models = Models.make(elements)
    host = Cpu(elements, options.threads)
    gpu = Gpu(models) if "cuda" in backends else None
    on_cpu = [name for name in backends if name not in ("numpy", "cuda")]
    if "numpy" in backends and (options.backends or elements <= _SMALL):
        on_cpu.append("numpy")
    lanes: list[Lane] = [] if gpu is None else list(gpu.memory())
    for bits, ops in work.items():
        made = KernelWorkload.make(models, bits, options.threads)
        if on_cpu and all(lane.op != "triad" for lane in lanes):
            lanes += host.memory(made)
        for op in ops if on_cpu else ():
            lanes += host.lanes(made, op, on_cpu)
        if gpu is not None:
            lanes += gpu.lanes(made, ops)
    return lanes


def _columns(cases: Sequence[_Case]) -> dict[str, list[Any]]:
    """All samples of all cases, one a row; yardstick_before and yardstick_after are seconds, too."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in (
            "op", "backend", "bits", "elements", "against", "how", "round", "warm_up",
            "seconds", "yardstick_before_seconds", "yardstick_after_seconds",
        )
    }  # fmt: skip
    for case in cases:
        lane = case.lane
        samples = zip(case.seconds, case.before, case.after, strict=True)
        for number, sample in enumerate(samples):
            row = (
                lane.op, lane.backend, lane.bits, lane.elements, lane.against, lane.how,
                number, number < WARM_UP, *sample,
            )  # fmt: skip
            for column, item in zip(columns.values(), row, strict=True):
                column.append(item)
    return columns


def _table(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    lines = [
        f"{settings['kernels']}, threads: {settings['threads']}, device: {settings['device']}, "
        f"load: {settings['load_before']:.1f} before, {settings['load_after']:.1f} after",
        f"{'op':<22}{'backend':<9}{'bits':>4}{'elements':>11}{'median ms':>11}{'min ms':>10}"
        f"{'GB/s':>7}{'ratio':>8}{'q1 .. q3':>18}{'of min':>8}{'samples':>9}  of",
    ]
    for row in rows:
        line = (
            f"{row['op']:<22}{row['backend']:<9}{row['bits'] or '':>4}{row['elements']:>11}"
            f"{row['median_ms']:>11.3f}{row['min_ms']:>10.3f}{row['gb_per_s']:>7.1f}"
        )
        ratio = row["ratio_to_trivial"] or row["ratio_to_fused"]
        if ratio is None:
            lines.append(f"{line}{row['samples']:>43}")
            continue
        spread = f"{row['ratio_q1']:.2f} .. {row['ratio_q3']:.2f}"
        against = "fused" if row["ratio_to_fused"] else f"trivial ({row['yardstick']})"
        if "percent_of_copy" in row:
            against = f"a copy, whose bandwidth it has to {row['percent_of_copy']:.0f} %"
        lines.append(
            f"{line}{ratio:>8.2f}{spread:>18}{row['ratio_of_min']:>8.2f}{row['samples']:>9}  {against}"
        )
    return lines
