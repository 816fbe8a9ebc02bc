"""Start a job of several ranks without a batch system, and judge how it ended.

An MPI launcher ends the whole job when one rank dies, and once it is told not to, its exit status
says nothing. So every rank runs under a small shell script that shields it from the launcher's
clean-up and writes its exit status into a directory; the verdict on the job comes from those files.
On a cluster the site's own launcher does this work: see ``jobs/train.sbatch``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.launch import mpiexec
from mpi_dasgd.launch.outcome import Outcome
from mpi_dasgd.launch.rank_status import Ranks, enable_stack_dump, rank_script, ready, setting_up

__all__ = ["COMMANDS", "Outcome", "enable_stack_dump", "launch", "ready", "run", "setting_up"]

COMMANDS = ("train", "doctor", "bench")  # those that know what to do on several ranks

_POLL_SECONDS = 0.05
_DUMP_SECONDS = 1.0  # from the request for stacks to the kill
_FAILURE_GRACE = 5.0  # from a rank's failure, or its loss in set-up, to the end of the others
_SIGNAL_GRACE = 10.0  # from a signal to SIGKILL
_LAUNCHER_GRACE = 5.0  # from the end of the ranks to the end of their launcher


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
    """Run a command of this program, or a Python script, on `n` ranks; other arguments as of `run`.

    Args:
        n: number of ranks.
        arguments: one of `COMMANDS` or a script ``*.py``, and its arguments.
        hosts, timeout, env, launcher, agent: see `run`.

    Returns:
        0 if all ranks ended with 0, or all but those that a signal killed (a line on stderr names
        them); else 124 after the time limit, 128 + signal after a signal or after a rank was
        killed in set-up, 2 (bad input) or 3 (diverged) if any rank ended so, else the status of
        the rank that failed first.

    Raises:
        UserError: `arguments` are neither, or as of `run`.
    """
    outcome = run(
        _command(arguments),
        n,
        needs_all=arguments[0] in COMMANDS,
        hosts=hosts,
        timeout=timeout,
        env=env,
        launcher=launcher,
        agent=agent,
    )
    if message := outcome.describe():
        print(f"mpi-dasgd launch: {message}", file=sys.stderr)
    return outcome.code


def _command(arguments: Sequence[str]) -> list[str]:
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return [sys.executable, "-m", "mpi_dasgd", *arguments]
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise UserError(f"launch: there is no script {first} (looked from {Path.cwd()})")
        return [sys.executable, *arguments]
    raise UserError(
        f"launch: expected one of {', '.join(COMMANDS)}, or a Python script (*.py), to run on the "
        f"ranks; got {first!r}{nearest(first, COMMANDS)}"
    )


def run(
    command: Sequence[str],
    n: int,
    *,
    needs_all: bool = False,
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
    ranks are killed. If a rank ends with an exit code other than 0, the others have 5 s to end. A
    rank that is killed leaves them alone, unless one of them has said `setting_up`, and does not
    say `ready` within 5 s: it waits for the dead, and all are ended.

    Args:
        command: program and arguments of each rank.
        n: number of ranks.
        needs_all: take every rank as having said `setting_up` when it starts, before MPI does. For
            programs that say `ready`, or that can never do without a rank.
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
    job = mpiexec.prepare(n, hosts=hosts, env=env, launcher=launcher, agent=agent)
    shared = hosts is not None or os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1"
    with (
        tempfile.TemporaryDirectory(
            prefix=".mpi-dasgd-", dir=Path.cwd() if shared else None, ignore_cleanup_errors=True
        ) as directory,
        _caught_signals() as caught,
    ):
        ranks = Ranks(Path(directory), n, agent or "ssh")
        script = Path(directory, "rank.sh")
        script.write_text(rank_script(job.family.rank_variable, needs_all=needs_all))
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
    own_first = ended_by != "loss"
    failed = sorted(
        (rank for rank in codes if codes[rank]), key=lambda rank: (codes[rank] > 128) == own_first
    )
    return Outcome(
        codes=tuple(codes.get(rank) for rank in range(n)),
        first=failed[0] if failed else None,
        launcher=process.returncode,
        ended_by=ended_by,
    )


def _watch(
    process: subprocess.Popen[bytes],
    ranks: Ranks,
    caught: list[signal.Signals],
    timeout: float | None,
) -> signal.Signals | str | None:
    """Wait for the end of the launcher, bringing it about when due; return what ended the job."""
    ended_by: signal.Signals | str | None = None
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    seen = 0  # signals
    stuck_since: float | None = None
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
            elif not ranks.is_deadlocked_by_loss(codes):
                stuck_since = None
            elif stuck_since is None:
                stuck_since = now
            elif now - stuck_since > _FAILURE_GRACE:
                ended_by = "loss"
                plan = [(now, terminate_ranks), *kill_from(now + _SIGNAL_GRACE)]
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
