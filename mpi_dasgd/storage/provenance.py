"""Provenance of a run: versions, machine, source and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

__all__ = ["provenance"]

PACKAGES = ("numpy", "torch", "mpi4py", "h5py", "cupy-cuda12x", "cupy-cuda13x", "mpi_dasgd")
SLURM = (
    "SLURM_CLUSTER_NAME",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "SLURM_SUBMIT_DIR",
)


def provenance() -> dict[str, str]:
    """Return flat attributes: versions, host, processor, git commit, command, start, Slurm job.

    Versions are read from the packages' metadata; nothing is imported. A missing package, git
    checkout or Slurm job has no entry.
    """
    entries = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            entries[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    entries |= {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_model": _cpu_model(),
        "cores_of_host": str(os.cpu_count()),
        "cores_usable": str(len(os.sched_getaffinity(0))),
    }
    entries |= _git(Path(__file__).parent.parent)
    entries |= {
        "command": shlex.join(sys.orig_argv),
        "directory": str(Path.cwd()),
        "started": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
    }
    entries |= {name.lower(): os.environ[name] for name in SLURM if name in os.environ}
    return entries


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(package: Path) -> dict[str, str]:
    """Return the commit of the checkout that tracks the package, if there is one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # A virtual environment inside another checkout is not tracked by it.
    if git("ls-files", "--error-unmatch", "errors.py") is None:
        return {}
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git_commit": commit, "git_dirty": "yes" if git("status", "--porcelain", ".") else "no"}
