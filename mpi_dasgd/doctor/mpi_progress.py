"""MPI progress at a busy target: whether RMA operations complete while it computes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mpi_dasgd.doctor.check import OK, WARNING, Check
from mpi_dasgd.doctor.timing import describe_latencies, latency_percentiles, time_calls
from mpi_dasgd.world import polled_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.transport.control_words import Words
    from mpi_dasgd.transport.rma.windows import WindowSlots

__all__ = ["PUT_BYTES", "check"]

PUT_BYTES = 1_000_000  # payload of the slots that are written

# Seconds
_BUSY = 0.3  # time for which the target computes
_INDEPENDENT = 0.1  # an operation that takes longer has waited for the end of the computation
_SLOW = 0.02  # latency above which training suffers


def check(comm: MPI.Intracomm, words: Words, slots: WindowSlots, where: str, target: int) -> Check:
    """Measure RMA operations of rank 0 on a busy target. Collective.

    If they wait for the target, they are measured again while the real transport, with its progress
    thread, runs on all ranks.

    Args:
        comm: communicator of all ranks.
        words: control words; word 0 of `target` is read.
        slots: payload slots of `PUT_BYTES`; slot 0 of `target` is written.
        where: place of `target` relative to rank 0, part of the check's name.
        target: the rank that computes.

    Returns:
        The finding on rank 0; a placeholder on the others.
    """
    message = slots.view(comm.rank, 0)
    assert message is not None, "own slots are in place"
    operations: dict[str, Callable[[], object]] = {
        "fetch_and_op": lambda: words.read(target, 0),
        "put": lambda: slots.put(target, 0, message),
    }
    alone, is_independent = _measure(comm, operations, target)
    values: dict[str, Any] = {"independent": is_independent, "alone": alone}
    if not is_independent:
        with _running_transport(comm):
            values["with_progress_thread"], _ = _measure(comm, operations, target)
    if comm.rank != 0:
        return Check("progress", OK, "")
    name = f"progress, {where}"
    if is_independent:
        text = (
            f"one-sided operations complete while the target computes: {describe_latencies(alone)}"
        )
        return Check(name, OK, text, values)
    helped = values["with_progress_thread"]
    text = (
        "operations complete only when the target enters MPI; with the progress thread of the "
        f"transport: {describe_latencies(helped)}"
    )
    if max(helped["fetch_and_op_us"], helped["put_us"]) < _SLOW * 1e6:
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


def _measure(
    comm: MPI.Intracomm, operations: dict[str, Callable[[], object]], target: int
) -> tuple[dict[str, float], bool]:
    """Measure `operations` at a busy target. Collective.

    Returns:
        Latencies by `latency_percentiles` (empty on ranks other than 0), and whether no operation
        waited for the target (the same on all ranks).
    """
    for _ in range(2):  # other processes of a loaded machine may delay a rank once
        latencies: dict[str, float] = {}
        slowest = 0.0
        for name, operation in operations.items():
            durations = _time_while_busy(comm, target, operation)
            latencies |= latency_percentiles(name, durations)
            slowest = max([slowest, *durations])
        is_independent = bool(comm.bcast(slowest < _INDEPENDENT))
        if is_independent:
            break
    return latencies, is_independent


def _time_while_busy(
    comm: MPI.Intracomm, target: int, operation: Callable[[], object]
) -> list[float]:
    """Time calls of `operation` on rank 0 while `target` computes. Collective.

    The target makes no MPI call meanwhile, except in the progress thread of a running transport.

    Returns:
        Duration of each call in seconds; empty on ranks other than 0.
    """
    polled_barrier(comm)
    durations: list[float] = []
    if comm.rank == target:
        matrix = np.eye(128)
        end = time.perf_counter() + _BUSY
        while time.perf_counter() < end:
            matrix = matrix @ matrix
    elif comm.rank == 0:
        time.sleep(_BUSY / 10)  # the target is computing by then
        durations = time_calls(operation, _BUSY / 2)
    polled_barrier(comm)
    return durations


@contextmanager
def _running_transport(comm: MPI.Intracomm) -> Iterator[None]:
    """Run the real transport, with its progress thread, in the background. Collective."""
    from mpi_dasgd import topology
    from mpi_dasgd.codecs.none import NoCodec
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint

    own_comm = comm.Dup()
    layout = NoCodec(1024, np.dtype(np.float32)).layout
    switch_interval = sys.getswitchinterval()
    endpoint = RmaEndpoint(own_comm, layout, topology.build("complete", own_comm.size))
    yield
    endpoint.close()
    sys.setswitchinterval(switch_interval)
    own_comm.Free()
