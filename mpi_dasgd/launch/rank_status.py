"""The status directory of a job: what its ranks leave there, and what `launch` reads from it.

A rank leaves RANK.pid (host and process), RANK.status (exit status), RANK.stage ("ready", or
"set-up" while it cannot do without the other ranks) and RANK.stacks (of its threads, on request).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Ranks", "enable_stack_dump", "rank_script", "ready", "setting_up"]

# Hydra sends SIGUSR1 to all ranks when one dies; an ignored signal stays ignored in the rank.
# INT, TERM and HUP must not end the script before its rank, or the exit status is lost. Its stderr
# is away while it waits, since a shell says "Killed" there.
_SCRIPT = """\
trap '' USR1
trap : INT TERM HUP
file="$MPI_DASGD_STATUS/$RANK_VARIABLE"
export MPI_DASGD_STACKS="$file.stacks" MPI_DASGD_STAGE="$file.stage"
NEEDS_ALL && echo set-up >"$file.stage"
exec 3>&2 2>/dev/null
sh -c 'exec 2>&3 3>&- && echo "$(uname -n) $$" >"$0.pid" && exec "$@"' "$file" "$@"
code=$?
exec 2>&3
echo $code >"$file.status"
exit 0
"""


def rank_script(rank_variable: str, *, needs_all: bool) -> str:
    """Return the shell script that runs a rank's command and keeps the status directory.

    Args:
        rank_variable: what the launcher calls the variable with a process's rank.
        needs_all: whether a rank is in set-up from the start on.
    """
    script = _SCRIPT.replace("RANK_VARIABLE", rank_variable)
    return script.replace("NEEDS_ALL", "true" if needs_all else "false")


def enable_stack_dump() -> None:
    """Let SIGUSR2 write the stacks of all threads: for `launch` to show, or else to stderr."""
    path = os.environ.get("MPI_DASGD_STACKS")
    file = Path(path).open("w") if path else sys.stderr  # noqa: SIM115 (open to the end)
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def setting_up() -> None:
    """Say that from here on, until `ready`, this rank cannot do without the others.

    If one is killed meanwhile, the launcher ends the job: the others would wait for it for ever.
    Does nothing outside of `mpi-dasgd launch`.
    """
    _enter_stage("set-up")


def ready() -> None:
    """Say that set-up is over: from here on this rank goes on if another one is killed.

    Does nothing outside of `mpi-dasgd launch`.
    """
    _enter_stage("ready")


def _enter_stage(stage: str) -> None:
    if path := os.environ.get("MPI_DASGD_STAGE"):
        Path(path).write_text(f"{stage}\n")


class Ranks:
    """The ranks of a job as the launching process sees them.

    Args:
        directory: the status directory.
        n: number of ranks.
        agent: program that reaches another host, called as ``agent HOST COMMAND...``.
    """

    def __init__(self, directory: Path, n: int, agent: str) -> None:
        self.directory = directory
        self.n = n
        self.agent = agent

    def codes(self) -> dict[int, int]:
        """Exit statuses so far, in the order in which the ranks ended."""
        files = [self.directory / f"{rank}.status" for rank in range(self.n)]
        ended = sorted((f for f in files if f.exists()), key=lambda f: f.stat().st_mtime_ns)
        texts = {int(file.stem): file.read_text() for file in ended}
        return {rank: int(text) for rank, text in texts.items() if text.endswith("\n")}

    def is_deadlocked_by_loss(self, codes: Mapping[int, int]) -> bool:
        """Whether, by the exit statuses so far, a rank was killed that another one waits for."""
        if not any(code > 128 for code in codes.values()):
            return False
        # Opened, not looked for: over NFS only that shows what another host has just written.
        return any(
            file.read_text() != "ready\n"
            for file in self.directory.glob("*.stage")
            if int(file.stem) not in codes
        )

    def send(self, number: int) -> None:
        """Send a signal to every rank that has started and not ended."""
        ended = self.codes()
        remote: dict[str, list[str]] = {}
        for file in self.directory.glob("*.pid"):
            host, _, pid = file.read_text().strip().partition(" ")
            if not pid or int(file.stem) in ended:
                continue
            if host != os.uname().nodename:
                remote.setdefault(host, []).append(pid)
            elif self._is_rank(int(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)
        for host, pids in remote.items():
            kill = [self.agent, host, f"kill -{int(number)} {' '.join(pids)} 2>/dev/null"]
            with contextlib.suppress(subprocess.TimeoutExpired):  # a dead host: try the others
                subprocess.run(kill, stdin=subprocess.DEVNULL, check=False, timeout=10)

    def _is_rank(self, pid: int) -> bool:
        """Whether local process `pid` is still of this job: its number may have been given anew."""
        try:
            return os.fsencode(self.directory) in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def dump_stacks(self) -> None:
        """Ask the ranks for their stacks: those that called `enable_stack_dump` have the file."""
        if any(self.directory.glob("*.stacks")):
            self.send(signal.SIGUSR2)

    def stacks(self) -> str:
        """What the ranks have written, each under its number."""
        parts = []
        for rank in range(self.n):
            file = self.directory / f"{rank}.stacks"
            text = file.read_text(errors="replace") if file.exists() else ""
            parts.append(f"--- stacks of rank {rank} ---\n{text or 'none'}\n")
        return "".join(parts)
