"""What the doctor measures between ranks: progress against a busy target, latency, bandwidth."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mpi_dasgd.doctor import contention
from mpi_dasgd.doctor.check import FAILS, OK, WARNING, Check
from mpi_dasgd.world import peers_by_node, polled_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.transport.control_words import Words
    from mpi_dasgd.transport.rma.shared_memory import NodeWords
    from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords
    from mpi_dasgd.world import World

__all__ = ["checks"]

_BUSY = 0.3  # seconds that a target computes
_STUCK = 0.1  # an operation that takes longer has waited for the end of the computation
_SLOW = 0.02  # seconds that an operation should not take on a transport that works
_PUT = 1_000_000  # bytes put meanwhile
_WORDS = 0.1  # seconds for the latency of one word operation
_BYTES = 16_000_000  # payload
_REPEATS = 9


def checks(environment: World) -> list[Check]:
    """Return the findings between rank 0 and a rank of its node and one of another. Collective."""
    from mpi4py import MPI

    from mpi_dasgd.codecs.none import NoCodec
    from mpi_dasgd.kernels import native
    from mpi_dasgd.transport.rma.shared_memory import NodeWords
    from mpi_dasgd.transport.rma.windows import WindowSlots, WindowWords

    comm = environment.comm
    near, far = peers_by_node(comm)
    others = {where: rank for where, rank in (("same node", near), ("other node", far)) if rank}
    words = WindowWords(comm, 2)
    layout = NoCodec(_BYTES // 4, np.dtype(np.float32)).layout
    node = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED))
    library = native.load()
    one = environment.nodes == 1 and comm.allreduce(library is not None, MPI.LAND)
    fast = NodeWords(comm, 2, library) if one and library is not None else None
    shared = WindowSlots(comm, node, layout, 1) if near is not None else None
    remote = WindowSlots(comm, node, layout, 1, "rma")
    small = WindowSlots(comm, node, NoCodec(_PUT // 4, np.dtype(np.float32)).layout, 1, "rma")
    node.Free()
    found = [
        *(_progress(comm, words, small, where, rank) for where, rank in others.items()),
        *(_latency(comm, words, fast, where, rank) for where, rank in others.items()),
        *(contention.check(comm, words, where, rank) for where, rank in others.items() if not fast),
        *(
            _bandwidth(comm, remote, shared if rank == near else None, where, rank)
            for where, rank in others.items()
        ),
    ]
    for slots in (small, remote, shared):
        if slots is not None:
            slots.close()
    words.close()
    if fast is not None:
        fast.close()
    return found


def _sample(operation: Callable[[], object], seconds: float, most: int = 3000) -> list[float]:
    """Return the seconds that each call takes, for so long or so many."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or (time.perf_counter() < end and len(samples) < most):
        start = time.perf_counter()
        operation()
        samples.append(time.perf_counter() - start)
    return samples


def _while_busy(comm: MPI.Intracomm, target: int, operation: Callable[[], object]) -> list[float]:
    """Return the seconds of `operation`, done by rank 0 while `target` computes. Collective.

    The target makes no MPI call meanwhile, except in the thread of a transport if there is one.
    """
    polled_barrier(comm)
    samples: list[float] = []
    if comm.rank == target:
        matrix = np.eye(128)
        end = time.perf_counter() + _BUSY
        while time.perf_counter() < end:
            matrix = matrix @ matrix
    elif comm.rank == 0:
        time.sleep(_BUSY / 10)  # the target is computing by then
        samples = _sample(operation, _BUSY / 2)
    polled_barrier(comm)
    return samples


def _progress(
    comm: MPI.Intracomm, words: WindowWords, slots: WindowSlots, where: str, target: int
) -> Check:
    """Whether operations complete while the target is busy, alone and with the transport."""
    message = slots.view(comm.rank, 0)
    assert message is not None, "own slots are in place"
    operations: dict[str, Callable[[], object]] = {
        "fetch_and_op": lambda: words.read(target, 0),
        "put": lambda: slots.put(target, 0, message),
    }

    def measure() -> tuple[dict[str, float], bool]:
        for _ in range(2):  # a busy machine may hold up a rank once
            figures: dict[str, float] = {}
            slowest = 0.0
            for name, operation in operations.items():
                samples = _while_busy(comm, target, operation)
                figures |= _figures(name, samples)
                slowest = max([slowest, *samples])
            independent = bool(comm.bcast(slowest < _STUCK))
            if independent:
                break
        return figures, independent

    alone, independent = measure()
    values: dict[str, Any] = {"independent": independent, "alone": alone}
    if not independent:
        with _transport(comm):
            values["with_courier"], _ = measure()
    if comm.rank != 0:
        return Check("progress", OK, "")
    name = f"progress, {where}"
    if independent:
        text = f"one-sided operations complete while the target computes: {_words(alone)}"
        return Check(name, OK, text, values)
    figures = values["with_courier"]
    text = (
        "operations complete only when the target enters MPI; with the courier thread of the "
        f"transport: {_words(figures)}"
    )
    if max(figures["fetch_and_op_us"], figures["put_us"]) < _SLOW * 1e6:
        return Check(name, OK, text, values)
    if where == "other node":
        text += (
            ", which is slow: set transport.progress_interval lower, leave a core for the thread, "
            "or with Open MPI's UCX set OMPI_MCA_opal_common_ucx_progress_iterations=1"
        )
    else:
        text += (
            ", which is slow: the library does not share the memory of a node; unset "
            "MPIR_CVAR_NOLOCAL (MPICH), or set OMPI_MCA_osc=^ucx (Open MPI)"
        )
    return Check(name, WARNING, text, values)


@contextmanager
def _transport(comm: MPI.Intracomm) -> Iterator[None]:
    """Have the real transport, with its thread, in the background. Collective."""
    from mpi_dasgd import topology
    from mpi_dasgd.codecs.none import NoCodec
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

    own = comm.Dup()
    layout = NoCodec(1024, np.dtype(np.float32)).layout
    interval = sys.getswitchinterval()
    endpoint = RmaEndpoint(own, layout, topology.build("complete", own.size))
    yield
    endpoint.close()
    sys.setswitchinterval(interval)
    own.Free()


def _latency(
    comm: MPI.Intracomm, words: WindowWords, fast: NodeWords | None, where: str, other: int
) -> Check:
    """Latency of operations on control words, the target looking into MPI now and then."""
    kinds: dict[tuple[str, str], Words] = {("fetch_and_op", "compare_and_swap"): words}
    if fast is not None:
        kinds["atomic_read", "atomic_swap"] = fast
    values: dict[str, Any] = {}
    lost: list[str] = []
    for (read, swap), kind in kinds.items():
        polled_barrier(comm)
        if comm.rank == 0:
            start = kind.read(other, 1)
            values |= _figures(read, _sample(partial(kind.read, other, 1), _WORDS))
            swaps = _sample(_counter(kind, other), _WORDS)
            values |= _figures(swap, swaps)
            if kind.read(other, 1) != start + len(swaps):
                lost.append(swap)
        polled_barrier(comm)
    name = f"words, {where}"
    if lost:
        text = f"{' and '.join(lost)} lost an update: install another MPI"
        return Check(name, FAILS, text, values)
    return Check(name, OK, _words(values), values)


def _counter(words: Words, rank: int) -> Callable[[], None]:
    """Return a function that adds one to the second word of `rank`, which nobody else changes."""
    value = words.read(rank, 1)

    def count() -> None:
        nonlocal value
        words.swap(rank, 1, value, value + 1)
        value += 1

    return count


def _bandwidth(
    comm: MPI.Intracomm, remote: WindowSlots, shared: WindowSlots | None, where: str, other: int
) -> Check:
    """Bandwidth of Put, Get and a copy in place, against memcpy in the same rounds."""
    mine = remote.view(comm.rank, 0)
    assert mine is not None, "own slots are in place"
    mine.payload[:] = comm.rank
    there = None if shared is None else shared.view(other, 0)
    if shared is not None and comm.rank == other:
        own = shared.view(other, 0)
        assert own is not None
        own.payload[:] = other
        shared.fence()
    polled_barrier(comm)
    samples: dict[str, list[float]] = {}
    wrong: list[str] = []
    if comm.rank == 0:
        source, copy = np.full(_BYTES // 4, -1, np.float32), np.zeros(_BYTES // 4, np.float32)
        from mpi_dasgd.codecs.message import Message

        layout = mine.layout
        out = Message(np.zeros(layout.nbytes, np.uint8), layout)
        operations: dict[str, Callable[[], object]] = {
            "memcpy": lambda: ctypes.memmove(copy.ctypes.data, source.ctypes.data, _BYTES),
            "get": lambda: remote.get(other, 0, out),
            "put": lambda: remote.put(other, 0, out),
        }
        if there is not None:
            operations["in_place"] = lambda: np.copyto(copy, there.payload)
        expected = {"memcpy": (copy, -1), "get": (out.payload, other), "in_place": (copy, other)}
        for repeat in range(_REPEATS + 1):
            for name, operation in operations.items():
                start = time.perf_counter()
                operation()
                seconds = time.perf_counter() - start
                array, value = expected.get(name, (copy, None))
                if value is not None and not (array == value).all():
                    wrong.append(name)
                if repeat:  # the first one touches memory for the first time
                    samples.setdefault(name, []).append(seconds)
    polled_barrier(comm)
    values = {
        f"{name}_mb_per_s": _BYTES / float(np.median(seconds)) / 1e6
        for name, seconds in samples.items()
    }
    name = f"payload, {where}"
    if wrong:
        text = f"{' and '.join(sorted(set(wrong)))} brought wrong bytes: install another MPI"
        return Check(name, FAILS, text, values)
    figures = ", ".join(f"{key.removesuffix('_mb_per_s')} {v:.0f}" for key, v in values.items())
    return Check(name, OK, f"MB/s at {_BYTES / 1e6:.0f} MB: {figures.replace('_', ' ')}", values)


def _figures(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    median, p99 = np.percentile(seconds, (50, 99)) * 1e6
    return {f"{name}_us": float(median), f"{name}_p99_us": float(p99)}


def _words(figures: dict[str, float]) -> str:
    """Median and 99th percentile of each operation, in words."""
    names = [key.removesuffix("_us") for key in figures if not key.endswith("_p99_us")]
    pairs = [(name, figures[f"{name}_us"], figures[f"{name}_p99_us"]) for name in names]
    return ", ".join(
        f"{name.capitalize()} {_time(median)} (p99 {_time(p99)})" for name, median, p99 in pairs
    )


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1000:.3g} ms"
