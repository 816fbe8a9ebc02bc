"""Start a job of several ranks without a batch system, and judge how it ended.

An MPI launcher ends the whole job when one rank dies, and once it is told not to, its exit status
says nothing. So every rank runs under a small shell script that shields it from the launcher's
clean-up and writes its exit status into a directory; the verdict on the job comes from those files.
On a cluster the site's own launcher does this work: see ``jobs/train.sbatch``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mpi_dasgd import launchers

__all__ = ["TIMED_OUT", "Outcome", "enable_stack_dump", "launch", "run"]

TIMED_OUT = 124  # exit code after the time limit, as of coreutils' timeout

_POLL_SECONDS = 0.05
_DUMP_SECONDS = 1.0  # from the request for stacks to the kill
_FAILURE_GRACE = 5.0  # from a rank's failure to the end of the others
_SIGNAL_GRACE = 10.0  # from a signal to SIGKILL
_LAUNCHER_GRACE = 5.0  # from the end of the ranks to the end of their launcher

# Hydra sends SIGUSR1 to all ranks when one dies; an ignored signal stays ignored in the rank.
# INT, TERM and HUP must not end the script before its rank, or the exit status is lost. Its stderr
# is away while it waits, since a shell says "Killed" there.
_RANK_SCRIPT = """\
trap '' USR1
trap : INT TERM HUP
file="$MPI_DASGD_STATUS/$RANK_VARIABLE"
export MPI_DASGD_STACKS="$file.stacks"
exec 3>&2 2>/dev/null
sh -c 'exec 2>&3 3>&- && echo "$(uname -n) $$" >"$0.pid" && exec "$@"' "$file" "$@"
code=$?
exec 2>&3
echo $code >"$file.status"
exit 0
"""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        codes: exit status of each rank as a shell gives it (128 + signal if killed); None: unknown.
        first: rank that failed first, an exit code of its own before a kill; None: none is known.
        launcher: exit status of the launcher.
        ended_by: None, the signal that was passed on, or "timeout".
    """

    codes: tuple[int | None, ...]
    first: int | None
    launcher: int
    ended_by: signal.Signals | str | None

    @property
    def code(self) -> int:
        """Exit code of the job, as `launch` returns it."""
        codes = set(self.codes)
        if self.ended_by == "timeout":
            return TIMED_OUT
        if codes == {0}:
            return 0
        if isinstance(self.ended_by, signal.Signals):
            return 128 + self.ended_by
        first = self.codes[self.first] if self.first is not None else None
        if None in codes:  # an aborted job: the launcher has its code
            codes.add(self.launcher % 256)
        for special in (2, 3):  # bad input, diverged
            if special in codes:
                return special
        if first is not None and first <= 128:
            return first
        if None in codes:
            return self.launcher % 256 or 1
        return 0 if 0 in codes else first or 1  # all failures are kills

    def describe(self) -> str:
        """One line for the user; empty if there is nothing to add to what the program said."""
        if self.ended_by == "timeout":
            return "time limit reached: all ranks were stopped"
        if self.ended_by is None and (set(self.codes) == {0} or set(self.codes) == {2}):
            return ""
        endings: dict[str, list[str]] = {}
        for rank in sorted(range(len(self.codes)), key=lambda rank: rank != self.first):
            endings.setdefault(self._ending(self.codes[rank]), []).append(str(rank))
        text = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} {ending}"
            for ending, ranks in endings.items()
        )
        if isinstance(self.ended_by, signal.Signals):
            return f"{self.ended_by.name} was passed on to the ranks: {text}"
        return text if self.code else f"warning: {text}"

    def _ending(self, code: int | None) -> str:
        if code is None:
            return f"left no exit status (the launcher ended with {self.launcher})"
        if code <= 128:
            return f"ended with exit code {code}"
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:  # a number without a name
            return f"ended with status {code}"


def enable_stack_dump() -> None:
    """Let SIGUSR2 write the stacks of all threads: for `launch` to show, or else to stderr."""
    path = os.environ.get("MPI_DASGD_STACKS")
    file = Path(path).open("w") if path else sys.stderr  # noqa: SIM115 (open to the end)
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def launch(
    n: int,
    arguments: Sequence[str],
    *,
    hosts: str | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    launcher: str | None = None,
    agent: str | None = None,
) -> int:
    """Run ``mpi-dasgd ARGUMENTS`` on `n` ranks; arguments and errors as of `run`.

    Returns:
        0 if all ranks ended with 0, or all but those that a signal killed (a line on stderr names
        them); else 124 after the time limit, 128 + signal after a signal, 2 (bad input) or
        3 (diverged) if any rank ended so, else the status of the rank that failed first.
    """
    outcome = run(
        [sys.executable, "-m", "mpi_dasgd", *arguments],
        n,
        hosts=hosts,
        timeout=timeout,
        env=env,
        launcher=launcher,
        agent=agent,
    )
    if message := outcome.describe():
        print(f"mpi-dasgd launch: {message}", file=sys.stderr)
    return outcome.code


def run(
    command: Sequence[str],
    n: int,
    *,
    hosts: str | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    launcher: str | None = None,
    agent: str | None = None,
    stdout: IO[str] | None = None,
    stderr: IO[str] | None = None,
) -> Outcome:
    """Run a command on `n` ranks and wait for its end; the ranks' output passes through.

    SIGINT, SIGTERM and SIGHUP are passed on to the ranks once; after 10 s, or at the next one, the
    ranks are killed. If a rank ends with an exit code other than 0, the others have 5 s to end; a
    rank that is killed leaves them alone.

    Args:
        command: program and arguments of each rank.
        n: number of ranks.
        hosts: ``"host:ranks,host:ranks"``; they must share the working directory.
            None: this machine, or the hosts of the batch job that this is called in.
        timeout: seconds until the ranks' stacks are shown and they are killed; None: no limit.
        env: variables for the ranks, over those of this process.
        launcher: `mpiexec` or `mpirun` to use; None: the one of the MPI that mpi4py loads.
        agent: program that reaches a host, called as ``agent HOST COMMAND...``; None: ssh.
        stdout: where the ranks' output goes; None: where this process's goes.
        stderr: the same.

    Raises:
        UserError: an argument is wrong, or no MPI or no launcher fits.
    """
    job = launchers.prepare(n, hosts=hosts, env=env, launcher=launcher, agent=agent)
    shared = hosts is not None or os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1"
    with (
        tempfile.TemporaryDirectory(
            prefix=".mpi-dasgd-", dir=Path.cwd() if shared else None, ignore_cleanup_errors=True
        ) as directory,
        _caught_signals() as caught,
    ):
        ranks = _Ranks(Path(directory), n, agent or "ssh")
        script = Path(directory, "rank.sh")
        script.write_text(_RANK_SCRIPT.replace("RANK_VARIABLE", job.family.rank_variable))
        process = subprocess.Popen(
            [*job.command, "sh", str(script), *command],
            env={**job.environment, "MPI_DASGD_STATUS": directory},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # a Ctrl-C reaches this process only
        )
        ended_by = _watch(process, ranks, caught, timeout)
        codes = ranks.codes()
        if ended_by == "timeout":
            print(ranks.stacks(), end="", file=stderr or sys.stderr, flush=True)
    failed = sorted((rank for rank in codes if codes[rank]), key=lambda rank: codes[rank] > 128)
    return Outcome(
        codes=tuple(codes.get(rank) for rank in range(n)),
        first=failed[0] if failed else None,
        launcher=process.returncode,
        ended_by=ended_by,
    )


class _Ranks:
    """The processes of a job as its status directory shows them: RANK.pid, .status and .stacks."""

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


def _watch(
    process: subprocess.Popen[bytes],
    ranks: _Ranks,
    caught: list[signal.Signals],
    timeout: float | None,
) -> signal.Signals | str | None:
    """Wait for the end of the launcher, bringing it about when due; return what ended the job."""
    ended_by: signal.Signals | str | None = None
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    seen = 0  # signals
    plan: list[tuple[float, Callable[[], None]]] = []  # what is still to be done, and when

    def terminate_ranks() -> None:
        ranks.send(signal.SIGTERM)

    def kill_ranks() -> None:
        ranks.send(signal.SIGKILL)

    def kill_launcher() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    def kill_from(moment: float) -> list[tuple[float, Callable[[], None]]]:
        return [(moment, kill_ranks), (moment + _LAUNCHER_GRACE, kill_launcher)]

    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
            break
        now = time.monotonic()
        if len(caught) > seen:
            if ended_by is None:
                ended_by = caught[0]
                ranks.send(ended_by)
            plan = kill_from(now + (_SIGNAL_GRACE if seen == 0 else 0.0))
            seen = len(caught)
        elif ended_by is None and now > deadline:
            ended_by = "timeout"
            ranks.dump_stacks()
            plan = kill_from(now + _DUMP_SECONDS)
        elif not plan:
            codes = ranks.codes()
            if len(codes) == ranks.n:
                plan = kill_from(now + _LAUNCHER_GRACE)
            elif any(0 < code <= 128 for code in codes.values()):
                end = now + _FAILURE_GRACE
                plan = [(end, terminate_ranks), *kill_from(end + _SIGNAL_GRACE)]
        while plan and now >= plan[0][0]:
            plan.pop(0)[1]()
    kill_ranks()  # of a launcher that died before them
    return ended_by


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of ending by them; ignored ones stay ignored."""
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda got, _: caught.append(signal.Signals(got)))
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
