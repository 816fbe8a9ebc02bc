"""Checks in the ranks of a job: placement, windows, exchange, network, device memory.

``python -m mpi_dasgd.doctor.probe MARK LIBRARY`` is the program of a rank of the doctor's own job:
rank 0 prints the findings as JSON in one line that starts with MARK.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from mpi_dasgd import launch, world
from mpi_dasgd.device import binding
from mpi_dasgd.doctor.check import FAILS, OK, WARNING, Check
from mpi_dasgd.errors import UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.world import World

__all__ = ["checks", "main"]


def main(mark: str, library: str) -> int:
    """Run as one rank of the doctor's own job.

    Args:
        mark: prefix of the line with the findings.
        library: file of the MPI library, or "".

    Returns:
        Exit code.
    """
    launch.enable_stack_dump()
    world.log_to_stderr()
    try:
        environment = world.start()
    except UserError as error:
        if world.expected_ranks()[1] == 0:
            _print_findings(mark, [Check("ranks", FAILS, str(error))])
        return error.exit_code
    environment.abort_on_exception()

    def body() -> int:
        findings = checks(environment, library)
        if environment.rank == 0:
            _print_findings(mark, findings)
        return 0

    return environment.run(body)


def _print_findings(mark: str, findings: Sequence[Check]) -> None:
    print(mark + json.dumps([vars(check) for check in findings]), flush=True)


def checks(environment: World, library: str) -> list[Check]:
    """Run all checks that need MPI. Collective.

    Args:
        environment: the ranks of the job.
        library: file of the MPI library, or "".

    Returns:
        The findings; those of rank 0 count.
    """
    from mpi_dasgd.doctor import network_checks

    findings = [_check_ranks(environment), _check_windows(environment)]
    if environment.comm.bcast(any(check.verdict == FAILS for check in findings)):
        return findings
    if environment.size > 1:
        findings += [_check_exchange(environment), *network_checks.checks(environment)]
    else:
        text = "one rank has no one to talk to: run the doctor with 2 ranks or more"
        findings.append(Check("exchange", WARNING, text))
    findings += _check_gpus(environment)
    return [*findings, _check_device_memory(library)]


def _check_ranks(environment: World) -> Check:
    """Check on which nodes the ranks are, and how many cores each may use. Collective."""
    from mpi4py import MPI

    comm = environment.comm
    cores = comm.allgather(len(os.sched_getaffinity(0)))
    node_sizes = comm.allgather(environment.node_size if environment.node_rank == 0 else 0)
    ranks_per_node = [size for size in node_sizes if size]
    thread_level = {MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE"}.get(MPI.Query_thread(), "less")
    values = {
        "ranks": comm.size,
        "nodes": environment.nodes,
        "ranks_per_node": ranks_per_node,
        "cores_of_rank": cores,
        "thread_level": thread_level,
    }
    nodes = f"{environment.nodes} node{'s' * (environment.nodes > 1)}"
    if environment.nodes > 1:
        nodes += f" ({', '.join(map(str, ranks_per_node))})"
    text = f"{comm.size} on {nodes}, {min(cores)} cores usable by each, {thread_level}"
    if min(cores) == 1 < (os.cpu_count() or 1):
        text += (
            "; bound to one core, a rank's threads wait for each other: bind to none or to several "
            "(mpirun --bind-to none, srun --cpus-per-task)"
        )
        return Check("ranks", WARNING, text, values)
    return Check("ranks", OK, text, values)


def _check_windows(environment: World) -> Check:
    """Check which constructors of windows yield one that works. Collective."""
    from mpi4py import MPI

    comm = environment.comm
    node_comm = cast("MPI.Intracomm", comm.Split_type(MPI.COMM_TYPE_SHARED))
    memory = np.zeros(1, np.int64)
    constructors: dict[str, tuple[MPI.Intracomm, Callable[[], MPI.Win]]] = {
        "Allocate": (comm, lambda: MPI.Win.Allocate(8, 8, comm=comm)),
        "Allocate_shared": (node_comm, lambda: MPI.Win.Allocate_shared(8, 8, comm=node_comm)),
        "Create": (comm, lambda: MPI.Win.Create(memory, 8, comm=comm)),
    }
    errors = {}
    for name, (window_comm, construct) in constructors.items():
        try:
            works = _transfers(window_comm, construct(), in_place=name == "Allocate_shared")
            error = "" if works else "a wrong number arrived"
        except MPI.Exception as raised:
            error = raised.Get_error_string()
        errors[name] = next((text for text in comm.allgather(error) if text), "")
    node_comm.Free()
    values = {name: not error for name, error in errors.items()}
    failures = {name: error for name, error in errors.items() if error}
    if not failures:
        return Check("windows", OK, f"{', '.join(errors)} work", values)
    text = "; ".join(f"Win.{name} does not work: {error}" for name, error in failures.items())
    if set(failures) == {"Create"} and environment.nodes == 1:
        return Check("windows", WARNING, f"{text}; it is needed with several nodes only", values)
    remedy = "install another MPI, as in `pip install 'mpi_dasgd[mpich]'`"
    if "Allocate_shared" in failures:
        remedy = f"set transport.mode=rma, or {remedy}"
    return Check("windows", FAILS, f"{text}; {remedy}", values)


def _transfers(comm: MPI.Intracomm, window: MPI.Win, in_place: bool) -> bool:
    """Send a number to the next rank, and check that of the previous rank. Collective.

    Args:
        comm: communicator of the window.
        window: window of one int64 per rank; it is freed.
        in_place: write by store instead of Put.

    Returns:
        Whether the right number arrived at this rank.
    """
    from mpi4py import MPI

    successor, predecessor = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    own = np.frombuffer(window.tomemory(), np.int64)
    own[0] = -1
    comm.Barrier()
    window.Lock_all(MPI.MODE_NOCHECK)
    if in_place:
        np.frombuffer(window.Shared_query(successor)[0], np.int64)[0] = comm.rank
    else:
        window.Put([np.full(1, comm.rank, np.int64), MPI.INT64_T], successor)
        window.Flush(successor)
    window.Sync()
    comm.Barrier()
    window.Sync()
    is_right = int(own[0]) == predecessor
    window.Unlock_all()
    window.Free()
    return is_right


def _check_exchange(environment: World) -> Check:
    """Check that a pair exchange on the real transport conserves the sum of models. Collective."""
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
    request = endpoint.begin_exchange([(comm.rank + 1) % comm.size])
    while not request.test():
        endpoint.refresh_membership()
    has_exchanged = request.partner_model is not None and request.partner_delta is not None
    if request.partner_model is not None and request.partner_delta is not None:
        buffers = ExchangeBuffers(
            partner_model=request.partner_model, reply_delta=request.partner_delta
        )
        codec.average_pair(x, buffers)
        request.partner_delta.stamp(rank=comm.rank, step=0, time_ns=endpoint.time_ns())
        endpoint.commit_exchange(request)
    while not endpoint.is_flushed():
        endpoint.refresh_membership()
    polled_barrier(environment.comm)
    for received in endpoint.inbox.receive():
        codec.average_pair(x, ExchangeBuffers(deltas=[received.message]))
        endpoint.inbox.free(received)
    sums = environment.comm.allreduce(x.astype(np.float64))
    have_all_exchanged = environment.comm.allreduce(int(has_exchanged)) == comm.size
    is_conserved = bool((sums == comm.size * (comm.size - 1) / 2).all())
    transfer_mode = endpoint.transfer_mode
    values = {"path": transfer_mode}
    endpoint.close()
    comm.Free()
    if have_all_exchanged and is_conserved:
        text = f"pair exchange conserves the sum of the models, {transfer_mode}"
        return Check("exchange", OK, text, values)
    text = (
        f"pair exchange ({transfer_mode}) changed the sum of the models or found no partner: this "
        "MPI library does not keep its promises; try transport.mode=rma, or another MPI"
    )
    return Check("exchange", FAILS, text, values)


def _check_gpus(environment: World) -> list[Check]:
    """Check that each rank has a GPU of its own, and sees those of its node. Collective."""
    own = binding.RankGpu(socket.gethostname())
    with environment.collective_errors():
        if binding.has_driver():
            import torch

            own = binding.read_rank_gpu(torch.device(binding.device_of_rank(environment)))
    ranks = environment.comm.allgather(own)
    devices = [rank.device for rank in ranks]
    shared, hidden = binding.shared_gpu(ranks), binding.hidden_peers(ranks)
    if shared or hidden:
        return [Check("gpus of ranks", WARNING, shared or hidden, {"devices": devices})]
    if set(devices) == {"cpu"}:
        return []
    text = f"each rank has its own: {', '.join(devices)}"
    return [Check("gpus of ranks", OK, text, {"devices": devices})]


def _check_device_memory(library: str) -> Check:
    """Report whether the MPI library is CUDA-aware, on which nothing depends."""
    try:
        query = ctypes.CDLL(library or None).MPIX_Query_cuda_support
    except (OSError, AttributeError):
        text = "the library does not say whether it is CUDA-aware (not needed)"
        return Check("mpi and cuda", OK, text)
    aware = bool(query())
    text = "the library says that it is CUDA-aware" if aware else "the library is not CUDA-aware"
    text += " (not needed: GPUs use each other's memory by CUDA IPC)"
    return Check("mpi and cuda", OK, text, {"cuda_aware": aware})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
