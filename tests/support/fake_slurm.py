"""A real Slurm cluster on fake hosts, to run job scripts as they are; see `hosts.py` for the hosts.

The controller runs on the first host, which is a compute node like the others. Nothing is left
behind, as the hosts end all processes in their namespaces. Each node has two GPUs, which are files
like /dev/null. Needs Debian's `slurmctld`, `slurmd` and
`slurm-client`; no munge, cgroups or systemd.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.fake_hosts import Hosts
from tests.support.mpi_ranks import missing

# auth/none is for a cluster that only we can reach. TmpFS and the spool are per node, as the fake
# hosts share their files. MinJobAge keeps jobs that have ended visible; SchedulerParameters avoid
# seconds of waiting before and after a job.
_CONF = """\
ClusterName=test
SlurmctldHost={controller}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool.%n
TmpFS={directory}/tmp.%n
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
SlurmdParameters=config_overrides
MinJobAge=3600
CompleteWait=0
KillWait=5
PropagateResourceLimitsExcept=MEMLOCK
GresTypes=gpu
NodeName={nodes} CPUs={cpus} RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

_TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# Told the version, slurmd does not look for cgroups, which it is not to use and the hosts lack.
_CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"


@dataclass(frozen=True)
class Job:
    """A job that has ended: Slurm's state, exit code of the script, and its output file."""

    number: int
    state: str
    code: int
    output: str


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        hosts: its nodes.
        environment: variables for Slurm's commands, and for jobs.
    """

    hosts: Hosts
    environment: Mapping[str, str]

    def run(self, *command: str, directory: str | Path = "/") -> str:
        """Run a command on the first node and return its output."""
        done = subprocess.run(
            [*self.hosts.enter(0), "env", "-C", str(directory), *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def with_variables(self, **variables: str) -> Cluster:
        """The same cluster, seen by a user who has these variables set."""
        return replace(self, environment={**self.environment, **variables})

    def submit(self, directory: Path, *arguments: str) -> int:
        """Submit a batch job from a directory; `arguments` are those of sbatch."""
        return int(self.run("sbatch", "--parsable", *arguments, directory=directory))

    def wait(self, number: int, timeout: float = 120) -> Job:
        """Wait for the end of a job."""
        end = time.monotonic() + timeout
        while True:
            text = self.run("scontrol", "--oneliner", "show", "job", str(number))
            fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
            state, output = fields["JobState"], Path(fields["StdOut"])
            if state in _ENDED:
                code = int(fields["ExitCode"].partition(":")[0])
                return Job(number, state, code, output.read_text(errors="replace"))
            if time.monotonic() > end:
                said = output.read_text(errors="replace") if output.exists() else "nothing"
                self.run("scancel", str(number))
                raise AssertionError(f"after {timeout:g} s the job is {state}; it said:\n{said}")
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster(hosts: Hosts, cpus: int) -> Iterator[Cluster]:
    """Set up Slurm on `hosts` with `cpus` cores each; skips where it is not installed (CI: fails).

    The nodes may claim more cores than the machine has.
    """
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            missing(f"Slurm's `{tool}` is not installed: `make test` installs it on Debian")
    with tempfile.TemporaryDirectory(prefix="mpi-dasgd-slurm-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        for part in ("state", *(f"{k}.{h}" for k in ("spool", "tmp") for h in hosts.names)):
            (directory / part).mkdir()
        (directory / "slurm.conf").write_text(
            _CONF.format(
                controller=hosts.names[0],
                directory=directory,
                nodes=",".join(hosts.names),
                cpus=cpus,
            )
        )
        (directory / "cgroup.conf").write_text(_CGROUP_CONF)
        for number in range(2):  # Slurm reads the numbers of GPUs from the names of their files
            os.mknod(directory / f"nvidia{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (directory / "gres.conf").write_text(f"Name=gpu File={directory}/nvidia[0-1]\n")
        environment = _environment() | {"SLURM_CONF": str(directory / "slurm.conf")}
        daemons = [["slurmctld", "-D", "-c"]] + [
            ["slurmd", "-D", "-N", node] for node in hosts.names
        ]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for daemon, place in zip(daemons, [0, *range(len(hosts.names))], strict=True):
                log = (directory / f"out.{len(processes)}").open("w")
                processes.append(
                    subprocess.Popen(
                        [*hosts.enter(place), *daemon],
                        env=environment,
                        cwd=directory,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
                log.close()
            cluster = Cluster(hosts, environment)
            _wait_until_up(cluster, processes, directory)
            yield cluster
        finally:
            for process in processes:
                process.kill()  # SIGTERM would have slurmd wait for its jobs
                process.wait()


def _environment() -> dict[str, str]:
    """This process's variables, less those of a job that it may itself be part of."""
    prefixes = ("SLURM", "SBATCH_", "SRUN_", "PMI", "OMPI_", "PRTE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def _wait_until_up(
    cluster: Cluster, daemons: list[subprocess.Popen[bytes]], directory: Path
) -> None:
    end = time.monotonic() + 30
    while True:
        with contextlib.suppress(AssertionError):  # the controller does not answer yet
            states = cluster.run("sinfo", "-h", "-N", "-o", "%T").split()
            if states == ["idle"] * len(cluster.hosts.names):
                return
        ended = any(daemon.poll() is not None for daemon in daemons)
        if ended or time.monotonic() > end:
            logs = sorted([*directory.glob("*.log"), *directory.glob("out.*")])
            text = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
            raise RuntimeError(f"Slurm did not start:\n{text}")
        time.sleep(0.1)
