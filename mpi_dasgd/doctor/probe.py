"""What the doctor examines in the ranks of a job: windows, exchange, progress, latency, bandwidth.

``python -m mpi_dasgd.doctor.probe MARK LIBRARY`` is a rank of the doctor's own job: rank 0 prints
one line, MARK and the findings as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from mpi_dasgd import launch, world
from mpi_dasgd.doctor.check import FAILS, OK, WARNING, Check
from mpi_dasgd.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.world import World

__all__ = ["checks", "main"]


def main(mark: str, library: str) -> int:
    """Be one rank of the doctor's own job; return its exit code."""
    launch.enable_stack_dump()
    world.log_to_stderr()
    try:
        environment = world.start()
    except UserError as error:
        found = [Check("ranks", FAILS, str(error))]
        if world.expected_ranks()[1] == 0:
            print(mark + json.dumps([vars(check) for check in found]), flush=True)
        return error.exit_code
    environment.abort_on_exception()

    def body() -> int:
        found = checks(environment, library)
        if environment.rank == 0:
            print(mark + json.dumps([vars(check) for check in found]), flush=True)
        return 0

    return environment.run(body)


def checks(environment: World, library: str) -> list[Check]:
    """Return the findings of all ranks together; those of rank 0 count. Collective.

    Args:
        environment: the ranks.
        library: file of the MPI library, or "".
    """
    from mpi_dasgd.doctor import network_checks

    found = [_ranks(environment), _windows(environment)]
    if environment.comm.bcast(any(check.verdict == FAILS for check in found)):
        return found
    if environment.size > 1:
        found += [_exchange(environment), *network_checks.checks(environment)]
    else:
        text = "one rank has no one to talk to: run the doctor with 2 ranks or more"
        found.append(Check("exchange", WARNING, text))
    return [*found, _device_memory(library)]


def _ranks(environment: World) -> Check:
    """Where the ranks are, and on how many cores."""
    from mpi4py import MPI

    comm = environment.comm
    cores = comm.allgather(len(os.sched_getaffinity(0)))
    on_nodes = comm.allgather(environment.node_size if environment.node_rank == 0 else 0)
    per_node = [count for count in on_nodes if count]
    level = {MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE"}.get(MPI.Query_thread(), "less")
    values = {
        "ranks": comm.size,
        "nodes": environment.nodes,
        "ranks_per_node": per_node,
        "cores_of_rank": cores,
        "thread_level": level,
    }
    where = f"{environment.nodes} node{'s' * (environment.nodes > 1)}"
    if environment.nodes > 1:
        where += f" ({', '.join(map(str, per_node))})"
    text = f"{comm.size} on {where}, {min(cores)} cores usable by each, {level}"
    if min(cores) == 1 < (os.cpu_count() or 1):
        text += (
            "; bound to one core, a rank's threads wait for each other: bind to none or to several "
            "(mpirun --bind-to none, srun --cpus-per-task)"
        )
        return Check("ranks", WARNING, text, values)
    return Check("ranks", OK, text, values)


def _windows(environment: World) -> Check:
    """Which kinds of window carry a number from rank to rank."""
    from mpi4py import MPI

    comm = environment.comm
    node = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED))
    memory = np.zeros(1, np.int64)
    kinds: dict[str, tuple[MPI.Intracomm, Callable[[], MPI.Win]]] = {
        "Allocate": (comm, lambda: MPI.Win.Allocate(8, 8, comm=comm)),
        "Allocate_shared": (node, lambda: MPI.Win.Allocate_shared(8, 8, comm=node)),
        "Create": (comm, lambda: MPI.Win.Create(memory, 8, comm=comm)),
    }
    errors = {}
    for kind, (members, make) in kinds.items():
        try:
            good = _carries(members, make(), in_place=kind == "Allocate_shared")
            error = "" if good else "a wrong number arrived"
        except MPI.Exception as raised:
            error = raised.Get_error_string()
        errors[kind] = next((text for text in comm.allgather(error) if text), "")
    node.Free()
    values = {kind: not error for kind, error in errors.items()}
    bad = {kind: error for kind, error in errors.items() if error}
    if not bad:
        return Check("windows", OK, f"{', '.join(errors)} work", values)
    text = "; ".join(f"Win.{kind} does not work: {error}" for kind, error in bad.items())
    if set(bad) == {"Create"} and environment.nodes == 1:
        return Check("windows", WARNING, f"{text}; it is needed with several nodes only", values)
    remedy = "install another MPI, as in `pip install 'mpi_dasgd[mpich]'`"
    if "Allocate_shared" in bad:
        remedy = f"set transport.mode=rma, or {remedy}"
    return Check("windows", FAILS, f"{text}; {remedy}", values)


def _carries(comm: MPI.Intracomm, window: MPI.Win, in_place: bool) -> bool:
    """Write a number to the next rank, look for the one of the rank before. Collective."""
    from mpi4py import MPI

    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    own = np.frombuffer(window.tomemory(), np.int64)
    own[0] = -1
    comm.Barrier()
    window.Lock_all(MPI.MODE_NOCHECK)
    if in_place:
        np.frombuffer(window.Shared_query(after)[0], np.int64)[0] = comm.rank
    else:
        window.Put([np.full(1, comm.rank, np.int64), MPI.INT64_T], after)
        window.Flush(after)
    window.Sync()
    comm.Barrier()
    window.Sync()
    good = int(own[0]) == before
    window.Unlock_all()
    window.Free()
    return good


def _exchange(environment: World) -> Check:
    """One pair exchange of every rank on the real transport: the sum of models must not change."""
    from mpi_dasgd import topology
    from mpi_dasgd.codecs import ExchangeBuffers, NoCodec
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
    from mpi_dasgd.world import polled_barrier

    comm = environment.comm.Dup()
    codec = NoCodec(1024, np.dtype(np.float32))
    endpoint = RmaEndpoint(comm, codec.layout, topology.build("complete", comm.size))
    x = np.full(1024, comm.rank, np.float32)
    message = endpoint.publication.reserve()
    assert message is not None, "nothing was published yet"
    codec.encode(x, message)
    message.stamp(rank=comm.rank, step=0, time_ns=endpoint.time_ns())
    endpoint.publication.publish()
    polled_barrier(environment.comm)
    pairing = endpoint.begin_exchange([(comm.rank + 1) % comm.size])
    while not pairing.test():
        endpoint.refresh_membership()
    met = pairing.partner_model is not None and pairing.partner_delta is not None
    if pairing.partner_model is not None and pairing.partner_delta is not None:
        buffers = ExchangeBuffers(
            partner_model=pairing.partner_model, reply_delta=pairing.partner_delta
        )
        codec.average_pair(x, buffers)
        pairing.partner_delta.stamp(rank=comm.rank, step=0, time_ns=endpoint.time_ns())
        endpoint.commit_exchange(pairing)
    while not endpoint.is_flushed():
        endpoint.refresh_membership()
    polled_barrier(environment.comm)
    for arrival in endpoint.inbox.receive():
        codec.average_pair(x, ExchangeBuffers(deltas=[arrival.message]))
        endpoint.inbox.free(arrival)
    sums = environment.comm.allreduce(x.astype(np.float64))
    met_all = environment.comm.allreduce(int(met)) == comm.size
    right = met_all and bool((sums == comm.size * (comm.size - 1) / 2).all())
    path = endpoint.transfer_mode
    endpoint.close()
    comm.Free()
    if right:
        return Check(
            "exchange", OK, f"pair exchange conserves the sum of the models, {path}", {"path": path}
        )
    text = (
        f"pair exchange ({path}) changed the sum of the models or found no partner: this MPI "
        "library does not keep its promises; try transport.mode=rma, or another MPI"
    )
    return Check("exchange", FAILS, text, {"path": path})


def _device_memory(library: str) -> Check:
    """What the MPI library says about device memory; nothing depends on it."""
    try:
        query = ctypes.CDLL(library or None).MPIX_Query_cuda_support
    except (OSError, AttributeError):
        return Check(
            "mpi and cuda", OK, "the library does not say whether it is CUDA-aware (not needed)"
        )
    aware = bool(query())
    text = "the library says that it is CUDA-aware" if aware else "the library is not CUDA-aware"
    text += " (not needed: payload windows are in host memory)"
    return Check("mpi and cuda", OK, text, {"cuda_aware": aware})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
