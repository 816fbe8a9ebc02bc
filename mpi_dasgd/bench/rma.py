"""`bench rma`: throughput of publications and inboxes, with memcpy as the baseline.

Rank 0 measures while the others wait. Every round runs each operation once, in random order and
with cold caches; memcpy between private arrays is one of them. Every payload that arrives is
compared with what was sent, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_dasgd import launch, world
from mpi_dasgd.bench import machine
from mpi_dasgd.bench.options import add_output_options, parse_quantity
from mpi_dasgd.bench.sample_store import columns_of, quartiles, samples_path, write_samples
from mpi_dasgd.errors import MpiDasgdError, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.world import World

__all__ = ["main"]

SIZES = ("1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "100MB")
FULL_SIZES = (*SIZES, "400MB")
WARM_UP = 3
"""Rounds that do not count: the first ones touch memory for the first time."""
PASSES = {"average": 3, "exchange": 4}
"""Passes over memory of each operation; all others read once and write once."""

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_JOB_SECONDS = 1800.0


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments and return the exit code.

    A process that no launcher has started starts the ranks itself.

    Raises:
        UserError: an argument is wrong, or memory is short.
    """
    options = _parser().parse_args(arguments)
    sizes = [_bytes(size) for size in options.sizes or (FULL_SIZES if options.full else SIZES)]
    if options.seconds <= 0:
        raise UserError(f"bench rma: --seconds must be positive, got {options.seconds}")
    if world.expected_ranks()[0] == 1:
        if options.ranks < 2:
            raise UserError(f"bench rma: --ranks must be at least 2, got {options.ranks}")
        command = [sys.executable, "-m", "mpi_dasgd", "bench", "rma", *arguments]
        outcome = launch.run(command, options.ranks, needs_all=True, timeout=_JOB_SECONDS)
        if message := outcome.describe():
            world.print_message(f"bench rma: {message}")
        return outcome.code
    launch.enable_stack_dump()
    environment = world.start()
    environment.abort_on_exception()
    return environment.run(lambda: _bench(environment, sizes, options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpi-dasgd bench rma",
        description="MB/s of publications and inboxes, in place and remote, against memcpy.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start, if run alone [2]")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        help=f"payload sizes, as in 64KiB 4MiB 100MB [{' '.join(SIZES)}]",
    )
    parser.add_argument("--full", action="store_true", help="add 400MB to the sizes")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="time for each size and mode, checks included [1]",
    )
    add_output_options(parser)
    return parser


def _bytes(text: str) -> int:
    size = parse_quantity(text, _UNITS)
    if size < 64 or size % 4:
        raise UserError(
            f"bench rma: --sizes: {text!r} is not a size; expected a multiple of 4 from 64 on, "
            f"with one of {', '.join(unit for unit in _UNITS if unit)} or none"
        )
    return size


@dataclass
class _Timings:
    """Samples of one payload size on one path.

    Attributes:
        path: ``in place`` or ``remote``.
        nbytes: payload.
        seconds: samples of each operation, in the order of the rounds, warm-up first.
    """

    path: str
    nbytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of the report per operation: statistics of all rounds but the warm-up."""
        spread = {op: quartiles(values[WARM_UP:]) for op, values in self.seconds.items()}
        return [
            {
                "op": op,
                "path": "private" if op == "memcpy" else self.path,
                "bytes": self.nbytes,
                "samples": len(self.seconds[op]) - WARM_UP,
                "q1_us": q1 * 1e6,
                "median_us": median * 1e6,
                "q3_us": q3 * 1e6,
                "mb_per_s": self.nbytes / median / 1e6,
                "ratio_to_memcpy": spread["memcpy"].median / median,
                "passes": PASSES.get(op, 2),
            }
            for op, (q1, median, q3) in spread.items()
        ]


def _bench(environment: World, sizes: Sequence[int], options: argparse.Namespace) -> int:
    from mpi_dasgd.kernels import native
    from mpi_dasgd.world import peers_by_node

    if environment.size < 2:
        raise UserError("bench rma: 2 ranks are needed, but the launcher started 1")
    on_node, off_node = peers_by_node(environment.comm)
    with environment.collective_errors():
        _require_memory(environment.node_size, max(sizes))
        path = samples_path("rma", options.out) if environment.rank == 0 else Path()
    remote = 1 if off_node is None else off_node
    timings = []
    for nbytes in sizes:
        if on_node is not None:
            timings.append(_measure(environment.comm, "in place", on_node, nbytes, options.seconds))
        timings.append(_measure(environment.comm, "remote", remote, nbytes, options.seconds))
    if environment.rank == 0:
        settings = {
            "mpi_library": environment.library,
            "ranks": environment.size,
            "nodes": environment.nodes,
            "kernels": native.status(),
        }
        write_samples(path, "rma", _columns(timings), settings)
        rows = [row for timing in timings for row in timing.rows()]
        if options.json:
            print(json.dumps({**settings, "samples": str(path), "rows": rows}), flush=True)
        else:
            print(_table(rows, settings, path), flush=True)
    return 0


def _require_memory(ranks: int, nbytes: int) -> None:
    """Require that the slots and arrays of a payload size fit in memory, before the allocation.

    Args:
        ranks: number of ranks on this node.
        nbytes: largest payload.

    Raises:
        UserError: memory is short.
    """
    # Slots of each rank, and private arrays of the two that exchange.
    needed = nbytes * (ranks * 5 + 10)
    available = machine.available_memory()
    free_bytes = {"memory": needed if available is None else available}
    if Path("/dev/shm").exists():
        free_bytes["/dev/shm"] = shutil.disk_usage("/dev/shm").free + nbytes * 10
    for name, free in free_bytes.items():
        if needed > free:
            raise UserError(
                f"bench rma: {ranks} ranks need {needed / 1e9:.1f} GB of {name} for a payload of "
                f"{nbytes / 1e6:.0f} MB, but {free / 1e9:.1f} GB are free; give smaller --sizes"
            )


def _measure(comm: MPI.Intracomm, path: str, peer: int, nbytes: int, seconds: float) -> _Timings:
    """Measure one payload size on one path between rank 0 and `peer`. Collective.

    Args:
        comm: communicator of all ranks.
        path: ``in place`` or ``remote``.
        peer: rank that rank 0 exchanges with.
        nbytes: payload.
        seconds: time to spend.

    Returns:
        The timings; on other ranks than 0 they are empty.

    Raises:
        MpiDasgdError: a payload arrived other than it was sent.
    """
    from mpi_dasgd import topology
    from mpi_dasgd.bench.rma_operations import Peer
    from mpi_dasgd.codecs.none import NoCodec
    from mpi_dasgd.config.schema import TransportConfig
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
    from mpi_dasgd.world import polled_barrier

    codec = NoCodec(nbytes // 4, np.dtype(np.float32))
    transport_comm = comm.Dup()
    endpoint = RmaEndpoint(
        transport_comm,
        codec.layout,
        topology.build("complete", comm.size),
        TransportConfig(
            mode="rma" if path == "remote" else "auto",
            publication_slots=3,
            # In place, one of them is reserved throughout.
            inbox_slots=2,
        ),
    )
    timings, wrong = _Timings(path, nbytes), 0
    if comm.rank in (0, peer):
        this_rank = Peer(endpoint, codec, peer if comm.rank == 0 else 0)
        if comm.rank == peer:
            this_rank.publish(0)
        polled_barrier(comm)
        if comm.rank == 0:
            timings.seconds = this_rank.measure(seconds, WARM_UP)
        polled_barrier(comm, this_rank.receive if comm.rank == peer else None)
        wrong = this_rank.wrong_payloads
    else:
        polled_barrier(comm)
        polled_barrier(comm)
    endpoint.close()
    transport_comm.Free()
    wrong = comm.allreduce(wrong)
    if wrong:
        raise MpiDasgdError(
            f"bench rma: {wrong} payloads of {nbytes} bytes ({path}) arrived other than they were "
            "sent: do not train with this MPI library; try another, or transport.mode=rma"
        )
    return timings


def _columns(timings: Sequence[_Timings]) -> dict[str, list[Any]]:
    """Return the columns of the raw samples, one row per sample."""
    return columns_of(
        {
            "op": op,
            "path": timing.path,
            "bytes": timing.nbytes,
            "round": number,
            "warm_up": number < WARM_UP,
            "seconds": seconds,
        }
        for timing in timings
        for op, samples in timing.seconds.items()
        for number, seconds in enumerate(samples)
    )


def _table(rows: Sequence[dict[str, Any]], settings: dict[str, Any], path: Path) -> str:
    lines = [
        f"{settings['mpi_library']}, {settings['ranks']} ranks on {settings['nodes']} nodes, "
        f"{settings['kernels']}",
        f"{'op':<9}{'path':<9}{'bytes':>10}{'median us':>12}{'q1 .. q3':>20}{'MB/s':>9}"
        f"{'of memcpy':>11}{'passes':>8}{'samples':>9}",
    ]
    for row in rows:
        spread = f"{row['q1_us']:.1f} .. {row['q3_us']:.1f}"
        lines.append(
            f"{row['op']:<9}{row['path']:<9}{row['bytes']:>10}{row['median_us']:>12.1f}{spread:>20}"
            f"{row['mb_per_s']:>9.0f}{row['ratio_to_memcpy']:>11.2f}{row['passes']:>8}"
            f"{row['samples']:>9}"
        )
    return "\n".join([*lines, f"raw samples: {path}"])
