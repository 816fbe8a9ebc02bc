"""Child processes of a rank, such as the workers of a DataLoader: what they inherit of MPI.

A worker that is forked is a copy of its rank, MPI included, which it must not use. One that is
spawned, or comes from a fork server, imports the script again, and with it perhaps MPI: with the
rank's connection to the launcher it would hang, or end the job.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mpi_dasgd.errors import UserError

__all__ = [
    "accept_failure_signal",
    "keep_launcher_to_this_process",
    "refuse_in_child",
    "shield_from_failure_signal",
]

# Variables by which a process finds its launcher; those that only number the ranks stay.
_CONNECTIONS = ("PMI_FD", "PMI_PORT", "PMIX_NAMESPACE", "PMIX_RANK", "PMIX_SERVER_URI")
_FAILURE_SIGNAL = signal.SIGUSR1  # by which MPICH's launcher reports that a rank has died

_rank_process: int | None = None  # id of the process that has started MPI


def refuse_in_child(ranks: int, rank: int) -> None:
    """Refuse to start MPI in a child process of a rank.

    Args:
        ranks: number of ranks that the launcher has started, 1 without a launcher.
        rank: number of this rank, or of the one that this process descends from.

    Raises:
        UserError: this process is a fork of a rank, or a worker that rank has started.
        SystemExit: in place of the error where a script without main guard is imported by a worker;
            the first worker of rank 0 has printed it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        _end_importing_worker(rank)
    if _rank_process not in (None, os.getpid()):
        raise UserError(
            f"this process (id {os.getpid()}) was forked from rank {rank} and cannot be a rank, or "
            "use MPI: construct Decentralized in the process that the launcher has started"
        )
    if ranks > 1 and multiprocessing.parent_process() and not _connected(os.environ):
        raise UserError(
            f"this process (id {os.getpid()}) was started by rank {rank} with multiprocessing and "
            "cannot be a rank: construct Decentralized in the process that the launcher has "
            f"started. `mpi-dasgd launch -n {ranks}` starts all ranks: a script needs no "
            "torch.multiprocessing.spawn"
        )


def _end_importing_worker(rank: int) -> None:
    """End a worker that imports a script without main guard, which would train in every worker."""
    if rank == 0 and multiprocessing.current_process().name.endswith(("-1", "MainProcess")):
        script = Path(sys.argv[0]).name or "the script"
        sys.stderr.write(
            f"mpi-dasgd: error: a worker process of {script} imports it again and would start "
            'training: put what the script does under `if __name__ == "__main__":`, or let the '
            'workers be forked (DataLoader(multiprocessing_context="fork"))\n'
        )
        sys.stderr.flush()
    raise SystemExit(UserError.exit_code)


def _connected(environment: Mapping[str, str]) -> bool:
    """Whether the launcher can be reached: its socket is open, or is opened by name."""
    if (text := environment.get("PMI_FD", "")).isdigit():
        try:
            return Path(f"/proc/self/fd/{text}").readlink().name.startswith("socket:")
        except OSError:
            return False
    return any(name.startswith(_CONNECTIONS) for name in environment)


def keep_launcher_to_this_process(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let children that import MPI be jobs of their own: remove what leads them to the launcher.

    To be called once MPI runs, which has read these variables.

    Args:
        environment: environment of this process.
    """
    global _rank_process
    _rank_process = os.getpid()
    for name in [name for name in environment if name.startswith(_CONNECTIONS)]:
        del environment[name]


def shield_from_failure_signal() -> None:
    """Block the launcher's signal in this thread, and so in processes that it starts from now on.

    MPICH's launcher sends it to all processes of a rank when another rank has died. MPICH handles
    it in the rank; in a process that was spawned it would be fatal. Another thread has to accept
    it, see `accept_failure_signal`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {_FAILURE_SIGNAL})


def accept_failure_signal() -> None:
    """Accept the launcher's signal in this thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {_FAILURE_SIGNAL})
