"""Which MPI library mpi4py loads, the launcher that goes with it, and what a job needs from it."""

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

__all__ = ["FAMILIES", "Family", "LaunchPlan", "Library", "find_launcher", "mpi_library", "prepare"]


@dataclass(frozen=True)
class Family:
    """What one implementation of MPI needs when a job is started by hand.

    Attributes:
        name: the beginning of its ``MPI_Get_library_version``.
        banner: a text that its launcher, and no other one, prints for ``--version``.
        extra: the extra of this package that installs it.
        rank_variable: what the launcher calls the variable with a process's rank.
        flags: launcher options of every job.
        hosts_flag: launcher option that takes ``host:ranks,host:ranks``.
        export_flag: launcher option that hands a variable on to other hosts; None: all are.
        environment: variables of every job; what the user has set wins.
        hosts_environment: the same, for jobs with hosts.
        agent_variables: variables that name the program to reach another host with.
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
        flags=("-disable-auto-cleanup",),  # the others live on when a rank dies
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
        # Bound, a rank's threads share one core; recovery: the others live on when a rank dies.
        flags=("--oversubscribe", "--bind-to", "none", "--enable-recovery"),
        hosts_flag="--host",
        export_flag="-x",
        environment={
            "UCX_LOG_LEVEL": "error",
            "OMPI_MCA_osc": "^ucx",  # noisy without InfiniBand
            "OMPI_MCA_mpi_yield_when_idle": "1",  # a rank that waits leaves the core to others
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        hosts_environment={},
        agent_variables=("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent"),  # Open MPI 5, 4
    ),
)


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads: the first line of its version text, and its file or ""."""

    version: str
    path: str

    @property
    def family(self) -> Family:
        """The table entry of this library.

        Raises:
            UserError: it is neither MPICH nor Open MPI.
        """
        for family in FAMILIES:
            if self.version.startswith(family.name):
                return family
        raise UserError(
            f"launch: the MPI library is {self.version!r}, not MPICH or Open MPI as expected; "
            "start the ranks with that library's own launcher, for example "
            "`srun python -m mpi_dasgd train jobs/train.toml`"
        )


_ASK_LIBRARY = """\
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
    """Find out, in a child process, which MPI library mpi4py loads in environment `env`.

    Raises:
        UserError: mpi4py finds none.
    """
    child = subprocess.run(
        [sys.executable, "-c", _ASK_LIBRARY], env=env, capture_output=True, text=True, check=False
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
    """Find the launcher that belongs to `library`: beside it, then in PATH.

    The launcher of another MPI would start every rank as a world of its own, so it is refused.

    Args:
        library: what mpi4py loads.
        launcher: use this one (a path, or a name in PATH) instead of looking.

    Raises:
        UserError: there is none, or `launcher` belongs to another MPI.
    """
    family = library.family
    if launcher is not None:
        found = shutil.which(launcher)
        if found is None:
            raise UserError(f"launch: launcher {launcher!r} is not an executable file")
        if not _belongs(found, family):
            raise UserError(
                f"launch: launcher {launcher!r} does not belong to {library.version!r}, which "
                "mpi4py loads; leave the launcher out, or point MPI4PY_LIBMPI at the libmpi.so of "
                "that launcher"
            )
        return found
    folders = [str(parent / "bin") for parent in Path(library.path).parents] if library.path else []
    for folder in [*folders, None]:  # None: PATH
        for name in ("mpiexec", "mpirun"):
            found = shutil.which(name, path=folder)
            if found is not None and _belongs(found, family):
                return found
    raise UserError(
        f"launch: mpi4py loads {library.version!r}, but no mpiexec or mpirun of it is beside "
        f"{library.path or 'the library'} or in PATH; load your site's module of that MPI, or "
        f"install a whole one with `pip install 'mpi_dasgd[{family.extra}]'`"
    )


def _belongs(launcher: str, family: Family) -> bool:
    """Whether the program `launcher` says that it is the one of `family`."""
    child = subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False)
    return family.banner in child.stdout + child.stderr


@dataclass(frozen=True)
class LaunchPlan:
    """A launcher's command line, for the command of the ranks to be appended, and environment."""

    family: Family
    command: list[str]
    environment: dict[str, str]


def prepare(
    n: int,
    *,
    hosts: str | None = None,
    env: Mapping[str, str] | None = None,
    launcher: str | None = None,
    agent: str | None = None,
) -> LaunchPlan:
    """Make the launcher's command line and environment for `n` ranks; arguments as of `launch.run`.

    Raises:
        UserError: an argument is wrong, or no MPI or no launcher fits.
    """
    slots = _slots(n, hosts)
    environment = {**os.environ, **(env or {})}
    library = mpi_library(environment)
    family = library.family
    program = find_launcher(library, launcher)

    defaults = {
        **family.environment,
        "OMP_NUM_THREADS": str(_threads(max(slots))),  # MKL and OpenBLAS heed it, too
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
            for variable in _exported(environment, {*defaults, *(env or {})}):
                command += [family.export_flag, variable]
    return LaunchPlan(family, command, environment)


def _slots(n: int, hosts: str | None) -> list[int]:
    """Ranks of each host."""
    if n < 1:
        raise UserError(f"launch: -n must be at least 1, got {n}")
    if hosts is None:
        return [n]
    slots = []
    for host in hosts.split(","):
        match = re.fullmatch(r"[\w.-]+(?::([1-9]\d*))?", host)
        if not match:
            raise UserError(f"launch: --hosts must be 'host:ranks,host:ranks', got {hosts!r}")
        slots.append(int(match[1] or 1))
    if sum(slots) < n:
        raise UserError(f"launch: --hosts {hosts!r} has room for {sum(slots)} ranks, but -n is {n}")
    return slots


def _threads(ranks: int) -> int:
    """Threads of each of `ranks` ranks that share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _exported(environment: Mapping[str, str], named: set[str]) -> Sequence[str]:
    """Variables for other hosts: the `named`, and those that steer Python, MPI and threads."""
    prefixes = ("MPI_DASGD_", "MPI4PY_", "OMP_", "PYTHON", "UCX_", "LD_LIBRARY_PATH", "PATH")
    return sorted(v for v in environment if v in named or v.startswith(prefixes))
