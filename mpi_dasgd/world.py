"""MPI start-up, in one place: thread level, a communicator of our own, device, and how a rank fails."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpi_dasgd.errors import MpiDasgdError, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "World",
    "choose_device",
    "expected_ranks",
    "log_to_stderr",
    "peers_by_node",
    "polled_barrier",
    "print_message",
    "start",
]

_POLL_SECONDS = 1e-4  # between two tests of a polled barrier

# Variables by which launchers tell a process how many there are, and which it is.
_LAUNCHERS = (
    ("MPI_DASGD_RANKS", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@dataclass(frozen=True)
class World:
    """The ranks of a job and this one's place among them.

    Attributes:
        comm: clone of COMM_WORLD; nobody else uses it.
        rank, size: this rank, and how many there are.
        node_rank, node_size: the same among the ranks of this node.
        nodes: number of nodes.
        library: the MPI library, one line.
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
        """A stage of set-up that fails on all ranks if it fails on one: call it on all ranks.

        Raises:
            UserError: on every rank, if any rank raised one; with the message of the first.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        messages = self.comm.allgather(None if error is None else str(error))
        for rank, message in enumerate(messages):
            if message is not None:
                everywhere = all(other == message for other in messages)
                where = "" if everywhere else f" (rank {rank})"
                raise UserError(message + where) from error

    def run(self, body: Callable[[], int]) -> int:
        """Run `body` and return its exit code; whatever goes wrong is said once and ends all ranks.

        A UserError has been raised on all ranks, and rank 0 prints it. Any other error of one rank
        is printed by that rank, and ends the others within seconds.
        """
        try:
            return body()
        except UserError as error:
            if self.rank == 0:
                print_message(f"error: {error}")
            return error.exit_code
        except MpiDasgdError as error:
            print_message(f"rank {self.rank}: error: {error}")
            self.abort(error.exit_code)
        except BaseException as error:
            self._report(error)
            self.abort(1)
        raise AssertionError("abort returned")

    def _report(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            print_message(f"rank {self.rank}: interrupted")
        else:
            text = "".join(traceback.format_exception(error)).rstrip()
            print_message(f"rank {self.rank} failed and ends the job:\n{text}")

    def abort(self, code: int) -> None:
        """End all ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(code)

    def abort_on_exception(self) -> None:
        """Have an uncaught exception of any thread end all ranks: else the others would wait for ever."""

        def in_main(kind: type[BaseException], error: BaseException, trace: object) -> None:
            if isinstance(error, UserError):  # raised on all ranks
                if self.rank == 0:
                    print_message(f"error: {error}")
                else:
                    time.sleep(1)  # rank 0 speaks before anyone aborts
                self.abort(error.exit_code)
            if isinstance(error, MpiDasgdError):
                print_message(f"rank {self.rank}: error: {error}")
                self.abort(error.exit_code)
            self._report(error)
            self.abort(1)

        def in_thread(arguments: threading.ExceptHookArgs) -> None:
            if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
                in_main(arguments.exc_type, arguments.exc_value, None)

        sys.excepthook = in_main
        threading.excepthook = in_thread


def print_message(message: str) -> None:
    """Print one message to stderr, in one piece, with the name of the program."""
    sys.stderr.write(f"mpi-dasgd: {message}\n")
    sys.stderr.flush()


class _ProgramHandler(logging.Handler):
    """Prints records as messages of the program, the level after the rank that speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print_message(re.sub(r"^(rank \d+: )?", rf"\g<0>{level}", self.format(record), count=1))


def log_to_stderr() -> None:
    """Print what the package logs as messages of ``mpi-dasgd``: for its own programs.

    In programs of others the logger ``mpi_dasgd`` is left as they configure it, or as Python has it without
    any configuration: warnings and errors go to stderr.
    """
    logger = logging.getLogger("mpi_dasgd")
    if not any(isinstance(handler, _ProgramHandler) for handler in logger.handlers):
        logger.addHandler(_ProgramHandler())


def expected_ranks(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return how many ranks the launcher has started and which of them this is; (1, 0) without one."""
    for size, rank in _LAUNCHERS:
        if environment.get(size, "").isdigit():
            numbers = [environment.get(name, "") for name in (rank, "OMPI_COMM_WORLD_RANK")]
            found = next((int(number) for number in numbers if number.isdigit()), 0)
            return int(environment[size]), found
    return 1, 0


def choose_device(node_rank: int, visible: int) -> str:
    """Return the torch device of a rank.

    Args:
        node_rank: this rank among those of its node.
        visible: CUDA devices that this process sees. If it is one, the launcher has bound it to
            this rank; of several each rank takes its own in turn; without any it is the CPU.
    """
    if visible == 0:
        return "cpu"
    return f"cuda:{node_rank % visible}"


def start() -> World:
    """Initialize MPI and look around. Collective.

    Raises:
        UserError: no MPI library, no MPI_THREAD_MULTIPLE, or not as many ranks as the launcher
            started (each process would train alone).
    """
    try:
        from mpi4py import MPI  # starts MPI, and sees to its end
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}); install one with "
            "`pip install 'mpi_dasgd[mpich]'`, or load your cluster's MPI module, or set "
            "MPI4PY_LIBMPI to the path of its libmpi.so"
        ) from error
    library = MPI.Get_library_version().splitlines()[0].strip("\0 \t")
    size, rank = expected_ranks()
    if MPI.COMM_WORLD.size != size and size > 1:
        message = (
            f"the launcher started {size} ranks, but this process sees {MPI.COMM_WORLD.size}: the "
            f"launcher does not belong to the MPI library in use ({library}). Start the job with "
            "`mpi-dasgd launch`, or with that library's own mpirun, or with srun --mpi=pmi2 (MPICH) "
            "or --mpi=pmix (Open MPI)"
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
    """Return the first rank that shares rank 0's node, and the first that does not. Collective."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    leaders = comm.allgather(node.bcast(comm.rank))
    node.Free()
    same_node = next((rank for rank, leader in enumerate(leaders) if rank and leader == 0), None)
    other_node = next((rank for rank, leader in enumerate(leaders) if leader != 0), None)
    return same_node, other_node


def polled_barrier(comm: MPI.Comm, serve: Callable[[], object] | None = None) -> None:
    """Wait for all ranks without burning a core. Collective.

    Args:
        comm: communicator of the ranks to wait for.
        serve: called between two tests of the barrier, so that this rank can answer others.
    """
    request = comm.Ibarrier()
    while not request.Test():
        if serve is not None:
            serve()
        time.sleep(_POLL_SECONDS)
