"""`bench rma`: how fast payload moves through publications and inboxes, against memcpy in the same run.

Rank 0 measures while the others wait. In every round it does each operation once, in random order,
and memcpy between private arrays is one of them; what arrived is compared outside of the timing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_dasgd import launch, world
from mpi_dasgd.bench.samples import DIRECTORY, quartiles, samples_path, write_samples
from mpi_dasgd.errors import MpiDasgdError, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.transport.rma import RmaEndpoint
    from mpi_dasgd.world import World

__all__ = ["main", "peers", "serve_until_all_come"]

SIZES = ("1KiB", "4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB", "100MB")
FULL = (*SIZES, "400MB")
WARM_UP = 3  # rounds: the first ones meet memory that was never touched
ROUNDS = (7, 2000)  # at least and at most

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_PAGE = 1024  # float32 elements of 4 KiB: one element of each page is new in every round
_LIMITS = {"average": 2 / 3, "exchange": 1 / 2}  # 3 and 4 passes over memory, memcpy makes 2
_JOB_SECONDS = 1800.0


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark: on ranks of its own, or on those that a launcher has started.

    Raises:
        UserError: an argument is wrong, or memory is short.
    """
    options = _parser().parse_args(arguments)
    sizes = [_bytes(size) for size in options.sizes or (FULL if options.full else SIZES)]
    if options.seconds <= 0:
        raise UserError(f"bench rma: --seconds must be positive, got {options.seconds}")
    if world.expected_ranks()[0] == 1:
        if options.ranks < 2:
            raise UserError(f"bench rma: --ranks must be at least 2, got {options.ranks}")
        command = [sys.executable, "-m", "mpi_dasgd", "bench", "rma", *arguments]
        outcome = launch.run(command, options.ranks, timeout=_JOB_SECONDS)
        if message := outcome.describe():
            world.say(f"bench rma: {message}")
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
        help="time for each size and path, checks included [1]",
    )
    parser.add_argument("--out", metavar="DIR", help=f"directory for the raw samples [{DIRECTORY}]")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    size = int(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if size < 64 or size % 4:
        raise UserError(
            f"bench rma: --sizes: {text!r} is not a size; expected a multiple of 4 from 64 on, "
            f"with one of {', '.join(unit for unit in _UNITS if unit)} or none"
        )
    return size


def peers(comm: MPI.Comm) -> tuple[int | None, int | None]:
    """Return the first rank that shares rank 0's node, and the first that does not. Collective."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leaders = comm.allgather(node.bcast(comm.rank))
    node.Free()
    near = next((rank for rank, leader in enumerate(leaders) if rank and leader == 0), None)
    far = next((rank for rank, leader in enumerate(leaders) if leader != 0), None)
    return near, far


def serve_until_all_come(comm: MPI.Comm, serve: Callable[[], object] | None = None) -> None:
    """Wait for all ranks without burning a core, calling `serve` meanwhile. Collective."""
    request = comm.Ibarrier()
    while not request.Test():
        if serve is not None:
            serve()
        time.sleep(1e-4)


@dataclass
class _Case:
    """One size on one path.

    Attributes:
        path: ``in place`` or ``remote``.
        nbytes: payload.
        seconds: samples of each operation, in the order of the rounds, warm-up first.
    """

    path: str
    nbytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Figures of each operation."""
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
                "limit": _LIMITS.get(op, 1.0),
            }
            for op, (q1, median, q3) in spread.items()
        ]


def _bench(environment: World, sizes: Sequence[int], options: argparse.Namespace) -> int:
    from mpi_dasgd.kernels import native

    if environment.size < 2:
        raise UserError("bench rma: 2 ranks are needed, but the launcher started 1")
    near, far = peers(environment.comm)
    with environment.together():
        _check_memory(environment.node_size, max(sizes))
        path = samples_path("rma", options.out) if environment.rank == 0 else Path()
    cases = []
    for nbytes in sizes:
        if near is not None:
            cases.append(_measure(environment.comm, "in place", near, nbytes, options.seconds))
        remote = 1 if far is None else far
        cases.append(_measure(environment.comm, "remote", remote, nbytes, options.seconds))
    if environment.rank == 0:
        settings = {
            "mpi_library": environment.library,
            "ranks": environment.size,
            "nodes": environment.nodes,
            "kernels": native.status(),
        }
        write_samples(path, "rma", _columns(cases), settings)
        rows = [row for case in cases for row in case.rows()]
        if options.json:
            print(json.dumps({**settings, "samples": str(path), "rows": rows}), flush=True)
        else:
            print(_table(rows, settings, path), flush=True)
    return 0


def _check_memory(ranks: int, nbytes: int) -> None:
    """Refuse sizes that would bring the machine to its knees."""
    needed = nbytes * (ranks * 5 + 10)  # slots of each rank, and private arrays of two
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"MemAvailable:\s*(\d+) kB", text)
    there = {"memory": int(match[1]) * 1024 if match else needed}
    if Path("/dev/shm").exists():
        there["/dev/shm"] = shutil.disk_usage("/dev/shm").free + nbytes * 10
    for name, free in there.items():
        if needed > free:
            raise UserError(
                f"bench rma: {ranks} ranks need {needed / 1e9:.1f} GB of {name} for a payload of "
                f"{nbytes / 1e6:.0f} MB, but {free / 1e9:.1f} GB are free; give smaller --sizes"
            )


def _measure(comm: MPI.Comm, path: str, peer: int, nbytes: int, seconds: float) -> _Case:
    """Measure one size on one path between rank 0 and `peer`. Collective.

    Raises:
        MpiDasgdError: a payload arrived other than it was sent.
    """
    from mpi_dasgd import topology
    from mpi_dasgd.codecs import NoCodec
    from mpi_dasgd.transport.rma import RmaEndpoint

    codec = NoCodec(nbytes // 4, np.dtype(np.float32))
    own = comm.Dup()
    endpoint = RmaEndpoint(
        own,
        codec.layout,
        topology.build("complete", comm.size),
        path="remote" if path == "remote" else "auto",
        publication_slots=3,
        inbox_slots=2,  # in place one of them is reserved throughout
    )
    case, wrong = _Case(path, nbytes), 0
    if comm.rank in (0, peer):
        side = _Side(endpoint, codec, peer if comm.rank == 0 else 0)
        if comm.rank == peer:
            side.publish(0)
        serve_until_all_come(comm)
        if comm.rank == 0:
            side.measure(case, seconds)
        serve_until_all_come(comm, side.receive if comm.rank == peer else None)
        wrong = side.wrong
    else:
        serve_until_all_come(comm)
        serve_until_all_come(comm)
    endpoint.close()
    own.Free()
    wrong = comm.allreduce(wrong)
    if wrong:
        raise MpiDasgdError(
            f"bench rma: {wrong} payloads of {nbytes} bytes ({path}) arrived other than they were "
            "sent: do not train with this MPI library; try another, or transport.path=remote"
        )
    return case


class _Side:
    """One of the two ranks that exchange: its arrays, and the operations that are timed.

    Args:
        endpoint: real transport.
        codec: of the messages.
        other: the other rank.
    """

    def __init__(self, endpoint: RmaEndpoint, codec: Any, other: int) -> None:
        from mpi_dasgd.codecs import Message

        elements = codec.layout.elements
        self.endpoint, self.codec, self.other = endpoint, codec, other
        self.in_place = endpoint.immediate(other)
        self.pattern = np.arange(elements, dtype=np.float32) % 65521
        self.x = self.pattern.copy()
        self.private = np.zeros_like(self.x)
        self.out = Message(np.zeros(codec.layout.nbytes, np.uint8), codec.layout)
        self.wrong = 0
        self.round = 0

    def check(self, found: np.ndarray, number: int) -> None:
        """Compare a payload with what round `number` has sent."""
        self.pattern[::_PAGE] = number
        self.wrong += not np.array_equal(found, self.pattern)

    def receive(self) -> None:
        """Take messages out of the inbox and compare them."""
        for arrival in self.endpoint.inbox.receive():
            self.check(arrival.message.payload, arrival.message.header.step)
            self.endpoint.inbox.free(arrival)

    def publish(self, number: int) -> float:
        """Encode and publish the model of round `number`; return the seconds it took."""
        self.x[::_PAGE] = number
        start = time.perf_counter()
        message = self.endpoint.publication.reserve()
        assert message is not None, "nobody holds publications of this rank"
        self.codec.encode(self.x, message)
        message.stamp(rank=self.endpoint.rank, step=number, time_ns=self.endpoint.time_ns())
        self.endpoint.publication.publish()
        seconds = time.perf_counter() - start
        self.check(message.payload, number)
        return seconds

    def measure(self, case: _Case, seconds: float) -> None:
        """Do rounds of all operations until the time is over."""
        operations: dict[str, Callable[[], float]] = {
            "memcpy": self._memcpy,
            "publish": lambda: self.publish(self.round),
            "read" if self.in_place else "get": self._read,
            "put": self._put,
        }
        pairing = None
        if self.in_place:
            pairing = self.endpoint.pair([self.other])
            assert pairing.theirs is not None and pairing.reply is not None
            theirs, reply = pairing.theirs.payload, pairing.reply.payload
            operations["average"] = lambda: self._average(theirs, None)
            operations["exchange"] = lambda: self._average(theirs, reply)
        case.seconds = {name: [] for name in operations}
        order = list(operations)
        shuffle = random.Random(1).shuffle
        least, most = ROUNDS
        end = time.perf_counter() + seconds
        while self.round < WARM_UP + most:
            if self.round >= WARM_UP + least and time.perf_counter() > end:
                break
            self.round += 1
            self.x[::_PAGE] = self.round
            shuffle(order)
            for name in order:
                case.seconds[name].append(operations[name]())
        if pairing is not None:
            self.endpoint.abandon(pairing)

    def _memcpy(self) -> float:
        to, source, nbytes = self.private.ctypes.data, self.x.ctypes.data, self.x.nbytes
        start = time.perf_counter()
        ctypes.memmove(to, source, nbytes)
        seconds = time.perf_counter() - start
        self.check(self.private, self.round)
        return seconds

    def _read(self) -> float:
        """Copy the other's newest publication, with the words that make sure that it is whole."""
        self.out.payload[::_PAGE] = -1
        start = time.perf_counter()
        whole = self.endpoint.publication.read(self.other, self.out)
        seconds = time.perf_counter() - start
        assert whole, "nobody replaces the publication"
        self.check(self.out.payload, 0)
        return seconds

    def _put(self) -> float:
        """Encode into the other's inbox and set it ready; remote: put what is encoded already."""
        inbox, rank = self.endpoint.inbox, self.endpoint.rank
        if not self.in_place:
            self.codec.encode(self.x, self.out)
            self.out.stamp(rank=rank, step=self.round, time_ns=self.endpoint.time_ns())
        start = time.perf_counter()
        reservation = inbox.reserve(self.other)
        assert reservation is not None, "the inbox was emptied"
        message = inbox.place(reservation)
        if message is None:
            message = self.out
        else:
            self.codec.encode(self.x, message)
            message.stamp(rank=rank, step=self.round, time_ns=self.endpoint.time_ns())
        inbox.send(reservation, message)
        seconds = time.perf_counter() - start
        self._wait_until_freed(2 - self.in_place)
        return seconds

    def _wait_until_freed(self, slots: int) -> None:
        """Wait until the other has compared what was put: its reading would disturb what follows."""
        inbox = self.endpoint.inbox
        while True:
            taken = [r for r in (inbox.reserve(self.other) for _ in range(slots)) if r is not None]
            for reservation in taken:
                inbox.cancel(reservation)
            if len(taken) == slots:
                return
            time.sleep(1e-4)

    def _average(self, theirs: np.ndarray, reply: np.ndarray | None) -> float:
        """Average a private model with the other's publication where it lies."""
        from mpi_dasgd.kernels.average import pair_average

        y = self.private
        y.fill(1.0)
        start = time.perf_counter()
        pair_average(y, (), theirs, 0.5, reply)
        seconds = time.perf_counter() - start
        # Whole and half numbers below 2**16: exact, so that one multiplication tells what it should be.
        y *= 2
        y -= 1
        self.check(y, 0)
        if reply is not None:
            np.multiply(reply, -2, out=y)
            y += 1
            self.check(y, 0)
        return seconds


def _columns(cases: Sequence[_Case]) -> dict[str, list[Any]]:
    """All samples of all cases, one a row."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("op", "path", "bytes", "round", "warm_up", "seconds")
    }
    for case in cases:
        for op, values in case.seconds.items():
            for number, value in enumerate(values):
                row = (op, case.path, case.nbytes, number, number < WARM_UP, value)
                for column, item in zip(columns.values(), row, strict=True):
                    column.append(item)
    return columns


def _table(rows: Sequence[dict[str, Any]], settings: dict[str, Any], path: Path) -> str:
    lines = [
        f"{settings['mpi_library']}, {settings['ranks']} ranks on {settings['nodes']} nodes, "
        f"{settings['kernels']}",
        f"{'op':<9}{'path':<9}{'bytes':>10}{'median us':>12}{'q1 .. q3':>20}{'MB/s':>9}"
        f"{'of memcpy':>11}{'at best':>9}{'samples':>9}",
    ]
    for row in rows:
        spread = f"{row['q1_us']:.1f} .. {row['q3_us']:.1f}"
        lines.append(
            f"{row['op']:<9}{row['path']:<9}{row['bytes']:>10}{row['median_us']:>12.1f}{spread:>20}"
            f"{row['mb_per_s']:>9.0f}{row['ratio_to_memcpy']:>11.2f}{row['limit']:>9.2f}"
            f"{row['samples']:>9}"
        )
    return "\n".join([*lines, f"raw samples: {path}"])
