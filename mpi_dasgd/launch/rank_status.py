"""The status directory of a job, through which the ranks report to the launching process.

Each rank writes RANK.pid (host name and process id), RANK.status (exit status), RANK.stage (see
`deadlock.py`; `process_end.py` adds the exit code to the last one) and RANK.stacks (stacks of its
threads, on request).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mpi_dasgd.launch.deadlock import CLOSED, CONSTRUCTING, LEAVING, READY, SET_UP

__all__ = [
    "Ranks",
    "closed",
    "constructing",
    "enable_stack_dump",
    "rank_script",
    "ready",
    "setting_up",
]

# Hydra sends SIGUSR1 to all ranks when one dies; an ignored signal stays ignored in the rank.
# INT, TERM and HUP must not end the script before its rank, or the exit status is lost. The stderr
# of the script is silenced while it waits, since the shell would print "Killed" there.
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
        rank_variable: environment variable in which the launcher passes a process its rank.
        needs_all: whether the rank is in set-up (see `setting_up`) from its start.
    """
    script = _SCRIPT.replace("RANK_VARIABLE", rank_variable)
    return script.replace("NEEDS_ALL", "true" if needs_all else "false")


def enable_stack_dump() -> None:
    """Let SIGUSR2 write the stacks of all threads to the status directory, or else to stderr."""
    path = os.environ.get("MPI_DASGD_STACKS")
    file = Path(path).open("w") if path else sys.stderr  # noqa: SIM115 (open until exit)
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def setting_up() -> None:
    """Declare that this rank needs all other ranks until it calls `ready`.

    If a rank is killed meanwhile, the launching process ends the job, since the others would wait
    for it indefinitely. Without `mpi-dasgd launch` this function has no effect.
    """
    _write_stage(SET_UP)


@contextlib.contextmanager
def constructing() -> Iterator[None]:
    """Declare that this rank constructs a `Decentralized` in the body, for which it needs all.

    If a rank is killed meanwhile, or has ended, the launching process ends the job. Afterwards this
    rank is in set-up again if it was before; else it is ready.
    """
    path = os.environ.get("MPI_DASGD_STAGE", "")
    before = Path(path).read_text() if path and Path(path).exists() else ""
    _write_stage(CONSTRUCTING)
    try:
        yield
    finally:
        _write_stage(SET_UP if before == f"{SET_UP}\n" else READY)


def ready() -> None:
    """Declare that set-up is over: from now on this rank continues if another one is killed.

    Without `mpi-dasgd launch` this function has no effect.
    """
    _write_stage(READY)


def closed() -> None:
    """Declare that this rank has closed all its trainings."""
    _write_stage(CLOSED)


def _write_stage(stage: str) -> None:
    if path := os.environ.get("MPI_DASGD_STAGE"):
        Path(path).write_text(f"{stage}\n")


class Ranks:
    """The ranks of a job as seen from the launching process.

    Args:
        directory: status directory.
        n: number of ranks.
        agent: program that runs a command on another host, called as ``agent HOST COMMAND...``.
    """

    def __init__(self, directory: Path, n: int, agent: str) -> None:
        self.directory = directory
        self.n = n
        self.agent = agent
        self._released: dict[int, int] = {}  # exit codes of ranks that were killed as they left

    def exit_codes(self) -> dict[int, int]:
        """Return the exit status by rank, in the order in which the ranks ended."""
        files = [self.directory / f"{rank}.status" for rank in range(self.n)]
        ended = sorted((f for f in files if f.exists()), key=lambda f: f.stat().st_mtime_ns)
        texts = {int(file.stem): file.read_text() for file in ended}
        codes = {rank: int(text) for rank, text in texts.items() if text.endswith("\n")}
        return {rank: self._released.get(rank, code) for rank, code in codes.items()}

    def stages(self) -> dict[int, str]:
        """Return the stage by rank, of those that have declared one; "" while it is written."""
        return {rank: words[0] if words else "" for rank, words in self._stage_words().items()}

    def _stage_words(self) -> dict[int, list[str]]:
        # Read, not only stat'ed: over NFS only opening a file shows what another host just wrote.
        files = self.directory.glob("*.stage")
        return {int(file.stem): file.read_text().partition("\n")[0].split() for file in files}

    def release(self) -> None:
        """Kill the ranks that have only MPI to finalize; their exit codes are those of their ends.

        They have run all of the program, its exit handlers included.
        """
        ended = self.exit_codes()
        for rank, words in self._stage_words().items():
            if rank not in ended and words[:1] == [LEAVING]:
                self._released[rank] = int(words[1])
        self.send_signal(signal.SIGKILL)

    def send_signal(self, signum: int) -> None:
        """Send a signal to every rank that has started and not ended."""
        ended = self.exit_codes()
        remote: dict[str, list[str]] = {}
        for file in self.directory.glob("*.pid"):
            host, _, pid = file.read_text().strip().partition(" ")
            if not pid or int(file.stem) in ended:
                continue
            if host != os.uname().nodename:
                remote.setdefault(host, []).append(pid)
            elif self._belongs_to_job(int(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signum)
        for host, pids in remote.items():
            kill = [self.agent, host, f"kill -{int(signum)} {' '.join(pids)} 2>/dev/null"]
            with contextlib.suppress(subprocess.TimeoutExpired):  # the host is down: try the others
                subprocess.run(kill, stdin=subprocess.DEVNULL, check=False, timeout=10)

    def _belongs_to_job(self, pid: int) -> bool:
        """Return whether local process `pid` belongs to this job: the id may have been reused."""
        try:
            return os.fsencode(self.directory) in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def kill_workers(self) -> None:
        """Kill worker processes of `multiprocessing` that ranks of this machine have left behind.

        Those of a fork server outlive a rank that was killed: they only watch their server.
        """
        for process in Path("/proc").glob("[0-9]*"):
            pid = int(process.name)
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if b"from multiprocessing." in (
                    process / "cmdline"
                ).read_bytes() and self._belongs_to_job(pid):
                    os.kill(pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        """Ask the ranks for their stacks, if any of them has called `enable_stack_dump`."""
        if any(self.directory.glob("*.stacks")):
            self.send_signal(signal.SIGUSR2)

    def stacks(self) -> str:
        """Return the stacks that the ranks have written, each under a heading with its rank."""
        parts = []
        for rank in range(self.n):
            file = self.directory / f"{rank}.stacks"
            text = file.read_text(errors="replace") if file.exists() else ""
            parts.append(f"--- stacks of rank {rank} ---\n{text or 'none'}\n")
        return "".join(parts)
