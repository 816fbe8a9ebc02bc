"""MPI start-up: thread level, private communicator, errors of all ranks together."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_dasgd import child_processes
from mpi_dasgd.errors import UserError
from mpi_dasgd.messages import log_to_stderr, print_message
from mpi_dasgd.process_end import process_end

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "World",
    "expected_ranks",
    "log_to_stderr",
    "peers_by_node",
    "polled_barrier",
    "print_message",
    "start",
]

_POLL_SECONDS = 1e-4  # between two polls of a barrier

# Environment variables in which launchers pass a process the number of ranks and its own rank.
_LAUNCHER_VARIABLES = (
    ("MPI_DASGD_RANKS", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@dataclass(frozen=True)
class World:
    """The ranks of a job, and the place of this rank among them.

    Attributes:
        comm: duplicate of COMM_WORLD, private to this package.
        rank: this rank in `comm`.
        size: number of ranks in `comm`.
        node_rank: this rank among the ranks of its node.
        node_size: number of ranks on this node.
        nodes: number of nodes.
        library: name and version of the MPI library, one line.
    """

    comm: MPI.Intracomm
    rank: int
    size: int
    node_rank: int
    node_size: int
    nodes: int
    library: str

    @contextlib.contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Make a UserError of one rank in the ``with`` block a UserError of all ranks. Collective.

        Raises:
            UserError: at least one rank raised one in the block; all ranks raise the message of the
                lowest such rank.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        messages = self.comm.allgather(None if error is None else str(error))
        for rank, message in enumerate(messages):
            if message is not None:
                unanimous = all(other == message for other in messages)
                suffix = "" if unanimous else f" (rank {rank})"
                raise UserError(message + suffix, on_all_ranks=True) from error

    def run(self, body: Callable[[], int]) -> int:
        """Run `body` and return its exit code; an error is printed once and ends all ranks.

        A UserError of all ranks (see `collective_errors`) is printed by rank 0. Any other error is
        printed by the rank that raised it, which then ends the job.

        Args:
            body: the program of this rank; returns its exit code.
        """
        process_end.watch(self.rank, self.size, self.comm.Abort)
        try:
            return body()
        except UserError as error:
            if not error.on_all_ranks:
                process_end.end_now(process_end.fail(error))
            if self.rank == 0:
                print_message(f"error: {error}")
            return error.exit_code
        except BaseException as error:
            process_end.end_now(process_end.fail(error))

    def abort_on_exception(self) -> None:
        """Let an uncaught exception in any thread of this process end all ranks.

        Otherwise the other ranks would wait for this one indefinitely.
        """
        process_end.watch(self.rank, self.size, self.comm.Abort)
        process_end.report_exceptions()


def expected_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Read from the environment how many ranks the launcher has started, without starting MPI.

    Returns:
        Number of ranks, and the rank of this process; (1, 0) without a launcher.
    """
    for size_name, rank_name in _LAUNCHER_VARIABLES:
        if environment.get(size_name, "").isdigit():
            texts = [environment.get(name, "") for name in (rank_name, "OMPI_COMM_WORLD_RANK")]
            rank = next((int(text) for text in texts if text.isdigit()), 0)
            return int(environment[size_name]), rank
    return 1, 0


def start() -> World:
    """Initialize MPI and return the ranks of the job. Collective.

    Raises:
        UserError: there is no MPI library, it lacks MPI_THREAD_MULTIPLE, or COMM_WORLD has
            not as many ranks as the launcher started (each process would train alone); this process
            is a child of a rank, as the workers of a DataLoader are.
        SystemExit: in place of the last UserErrors in all processes but one, which prints it.
    """
    size, rank = expected_ranks()
    child_processes.refuse_in_child(size, rank)
    try:
        from mpi4py import MPI  # initializes MPI, and finalizes it at exit
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}); install one with "
            "`pip install 'mpi_dasgd[mpich]'`, or load your cluster's MPI module, or set "
            "MPI4PY_LIBMPI to the path of its libmpi.so"
        ) from error
    child_processes.keep_launcher_to_this_process()
    library = MPI.Get_library_version().splitlines()[0].strip("\0 \t")
    if MPI.COMM_WORLD.size != size and size > 1:
        message = (
            f"the launcher started {size} ranks, but this process sees {MPI.COMM_WORLD.size}: the "
            f"launcher does not belong to the MPI library in use ({library}). Start the job with "
            "`mpi-dasgd launch`, or with that library's own mpirun, or with srun --mpi=pmi2 "
            "(MPICH) or --mpi=pmix (Open MPI)"
        )
        if rank == 0:
            raise UserError(message)
        raise SystemExit(UserError.exit_code)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UserError(
            f"MPI_THREAD_MULTIPLE is needed, but {library} provides level {MPI.Query_thread()}; "
            "use a build with thread support, and do not set MPICH_MAX_THREAD_SAFETY lower"
        )
    comm = MPI.COMM_WORLD.Dup()
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    nodes = comm.allreduce(1 if node.rank == 0 else 0)
    world = World(comm, comm.rank, comm.size, node.rank, node.size, nodes, library)
    node.Free()
    return world


def peers_by_node(comm: MPI.Intracomm) -> tuple[int | None, int | None]:
    """Find a rank on the node of rank 0 and a rank on another node. Collective.

    Returns:
        The lowest rank other than 0 on the node of rank 0, and the lowest rank on another node;
        None if there is none.
    """
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leaders = comm.allgather(node.bcast(comm.rank))
    node.Free()
    same_node = next((rank for rank, leader in enumerate(leaders) if rank and leader == 0), None)
    other_node = next((rank for rank, leader in enumerate(leaders) if leader != 0), None)
    return same_node, other_node


def polled_barrier(comm: MPI.Comm, serve: Callable[[], object] | None = None) -> None:
    """Wait for all ranks of `comm` in a barrier that yields the core between polls. Collective.

    Args:
        comm: communicator of the ranks to wait for.
        serve: function called between two polls, so that this rank can answer others.
    """
    request = comm.Ibarrier()
    while not request.Test():
        if serve is not None:
            serve()
        time.sleep(_POLL_SECONDS)
