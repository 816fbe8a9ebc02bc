"""``bench training``: samples per second of each algorithm, as a share of no exchange at all.

Only shares compare: a machine's speed drifts by more than the algorithms differ. So every algorithm
is measured beside `alone`: the same ranks, seed, batches and straggler, without any exchange.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from mpi_dasgd.bench.gpu_device import DEVICES, gpu_count, require_gpu
from mpi_dasgd.bench.job_series import measure_all, warn_of_others
from mpi_dasgd.bench.measurement import WARM_UP, measure
from mpi_dasgd.bench.options import add_output_options
from mpi_dasgd.bench.sample_store import samples_path, write_samples
from mpi_dasgd.bench.training_plan import (
    FULL_PLAN,
    QUICK_PLAN,
    REFERENCE,
    Plan,
    cores,
)
from mpi_dasgd.bench.training_report import (
    LEGEND,
    columns,
    require_same_start,
    shared_gpus,
    summarize,
    table,
)

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments and return the exit code.

    Raises:
        UserError: an argument is wrong.
        ValueError: the algorithms did not train on the same problem.
    """
    options = _parser().parse_args(arguments)
    given = {name: value for name in FULL_PLAN if (value := getattr(options, name)) is not None}
    plan = Plan(**{**(QUICK_PLAN if options.quick else FULL_PLAN), **given})
    device, gpus = "cpu", 0
    if plan.device == "cuda":
        device, gpus = require_gpu("bench training: --device cuda"), gpu_count()
    path = samples_path("training", options.out)
    results, code = measure_all(list(plan.measurements()), measure)
    if not results:
        return code
    settings = {"cores": cores(), "warm_up": WARM_UP, "device": device, "gpus": gpus}
    write_samples(path, "training", columns(results), settings)
    require_same_start(results)
    rows = summarize(results, gpus)
    warn_of_others([result.cpu_others for result in results])
    if options.json:
        print(json.dumps({"device": device, "rows": rows, "samples": str(path)}))
    else:
        print("\n".join(table(rows)))
        print(LEGEND)
        print("\n".join([f"device: {device}", *shared_gpus(rows, device, gpus)]))
        print(f"raw samples: {path}")
    return code


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="mpi-dasgd bench training", description=__doc__)
    add = parser.add_argument
    tasks = (
        "T1 (CNN, 10 k parameters, 2 ms per step), T2 (MLP, 25.1 M, 110 ms), T3 (CNN, 1.2 M, 45 ms)"
    )
    stragglers = (
        "none, sK: the last rank sleeps to be K times slower, cK: it computes K times as much"
    )
    algorithms = (
        f"{REFERENCE} is always measured; ddp is torch's DistributedDataParallel over gloo; "
        "adpsgd:lattice4 has that codec"
    )
    add("--tasks", type=names, help=f"{tasks} [all]")
    add("--ranks", type=numbers, help="numbers of ranks [2,4]")
    add("--stragglers", type=names, help=f"{stragglers} [none,s4,s10,c4,c10]")
    add("--algorithms", type=names, help=f"{algorithms} [all]")
    add("--seconds", type=float, help="length of a measurement [as the task needs]")
    add("--device", choices=DEVICES, help="cpu, or cuda: a GPU per rank, or shared by them [cpu]")
    add("--repeats", type=int, help="measurements of each [3]")
    add(
        "--quick",
        action="store_true",
        help="defaults of a first look: T1, 2 ranks, none and s10, once, 3 s",
    )
    add_output_options(parser)
    return parser
