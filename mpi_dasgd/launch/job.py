"""Start a job of several ranks without a batch system, and judge how it ended.

By default an MPI launcher ends the whole job when one rank dies. With that switched off, its exit
status no longer tells how the ranks ended. So every rank runs under a small shell script that
shields it from the launcher's clean-up and writes its exit status into a directory; the verdict on
the job comes from those files. On a cluster the site's own launcher does this work: see
``jobs/train.sbatch``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from mpi_dasgd.errors import UserError, nearest
from mpi_dasgd.launch import mpiexec
from mpi_dasgd.launch.outcome import Outcome
from mpi_dasgd.launch.rank_status import Ranks, rank_script
from mpi_dasgd.launch.supervisor import Supervisor

__all__ = ["COMMANDS", "launch", "run"]

COMMANDS = ("train", "doctor", "bench")  # commands of this program that run on several ranks


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
    """Run a command of this program, or a Python script, on `n` ranks and wait for its end.

    Args:
        n: number of ranks.
        arguments: one of `COMMANDS` or a script ``*.py``, followed by its own arguments.
        hosts, timeout, env, launcher, agent: as in `run`.

    Returns:
        Exit code of the job. 0: all ranks ended with 0, except for ranks that a signal killed (a
        line on stderr names these). 124: the time limit was reached. 128 + signal: this process
        received a signal, or a rank was killed during set-up. 2 (bad input) or 3 (diverged): at
        least one rank ended with this code. Otherwise the exit code of the rank that failed first.

    Raises:
        UserError: `arguments` name neither a command nor a script, or `run` refuses an argument.
    """
    outcome = run(
        _rank_command(arguments),
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


def _rank_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line that each rank runs."""
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
    """Run a command on `n` ranks and wait for its end.

    The first SIGINT, SIGTERM or SIGHUP is forwarded to the ranks; 10 s later, or at the next
    signal, the ranks are killed. If a rank ends with a nonzero exit code, the others get 5 s to
    end. If a rank is killed by a signal, the others continue. The exceptions are ranks that wait
    in vain for one that has ended (see `find_deadlock`) for 5 s: in set-up, or in the construction
    of a `Decentralized`, all ranks are ended; to finalize MPI, these are, with their own codes.

    Args:
        command: program and arguments of each rank.
        n: number of ranks.
        needs_all: treat every rank as in set-up from its start, even before it initializes MPI. For
            programs that call `ready`, or that can never continue without a rank.
        hosts: ``"host:ranks,host:ranks"``; the hosts must share the working directory. None: this
            machine, or the hosts of the surrounding batch job.
        timeout: seconds after which the stacks of the ranks are printed and the ranks are killed;
            None: no limit.
        env: environment variables for the ranks, in addition to those of this process.
        launcher: `mpiexec` or `mpirun` to use; None: the one of the MPI that mpi4py loads.
        agent: program that runs a command on a host, called as ``agent HOST COMMAND...``; None:
            ssh.
        stdout: file for the ranks' output; None: this process's stdout.
        stderr: file for the ranks' error output; None: this process's stderr.

    Raises:
        UserError: an argument is wrong, or there is no suitable MPI library or launcher.
    """
    plan = mpiexec.plan_launch(n, hosts=hosts, env=env, launcher=launcher, agent=agent)
    shared = hosts is not None or os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1"
    with (
        tempfile.TemporaryDirectory(
            prefix=".mpi-dasgd-", dir=Path.cwd() if shared else None, ignore_cleanup_errors=True
        ) as directory,
        _caught_signals() as caught,
    ):
        ranks = Ranks(Path(directory), n, agent or "ssh")
        script = Path(directory, "rank.sh")
        script.write_text(rank_script(plan.family.rank_variable, needs_all=needs_all))
        process = subprocess.Popen(
            [*plan.command, "sh", str(script), *command],
            env={**plan.environment, "MPI_DASGD_STATUS": directory},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # a Ctrl-C reaches this process only
        )
        supervisor = Supervisor(process, ranks, caught, timeout)
        ended_by, deadlock = supervisor.wait(), supervisor.deadlock
        codes, stages = ranks.exit_codes(), ranks.stages()
        if ended_by == "timeout":
            print(ranks.stacks(), end="", file=stderr or sys.stderr, flush=True)
    # `codes` is in order of time, and the sort is stable. A rank that ended by itself precedes a
    # killed one, unless others waited for that one.
    failed = sorted((rank for rank in codes if codes[rank]), key=lambda rank: codes[rank] > 128)
    first = [*(deadlock.missing if deadlock else ()), *failed, None][0]
    return Outcome(
        codes=tuple(codes.get(rank) for rank in range(n)),
        first_failed=first,
        launcher_code=process.returncode,
        ended_by=ended_by,
        deadlock=deadlock,
        stage="" if first is None else stages.get(first, ""),
    )


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying of them.

    Signals that this process ignores stay ignored.
    """
    caught: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {signum: signal.getsignal(signum) for signum in signums}
    try:
        for signum, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(signum, lambda number, _: caught.append(signal.Signals(number)))
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
