"""Ranks that stay, and run one program after the other: starting and importing are done once.

    done = run_pooled(2, "from mpi4py import MPI; assert MPI.COMM_WORLD.size == 2")

A rank that trains imports for seconds what it then uses for one. So tests whose ranks all live to
the end share the processes, one pool of ranks for each MPI library and number of ranks. Tests of
the launcher, of a death, of time limits and of several hosts have jobs of their own (`run_ranks`).

This file is also what each rank runs: ``rank_pool.py DIRECTORY``. Requests reach a rank as lines of
JSON in a pipe of its own; what a program prints, and how it ended, it leaves in files.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mpi_dasgd.launch import Outcome, enable_stack_dump
from tests.support.mpi_ranks import Completed, launch_request, start_launch

POOLS = 4  # at once: each of their ranks keeps some hundred MB
GRACE = 5.0  # seconds from the failure of a rank to the end of the others, as of `launch`
_pools: dict[tuple[str, int], RankPool] = {}  # the least recently used first


def run_pooled(
    n: int,
    program: str | Path,
    *args: str,
    mpi: str = "mpich",
    timeout: float = 120,
    check: bool = True,
) -> Completed:
    """Run `program` on `n` ranks that other tests use as well; as `run_ranks` otherwise.

    A program must leave MPI as it found it, and no rank may end its process. After any failure the
    next one gets new ranks.

    Args:
        n: number of ranks.
        program: Python code, or the path of a Python file.
        args: its arguments.
        mpi: one of `MPIS`.
        timeout: seconds until the ranks are ended and the test fails, showing their stacks.
        check: whether an exit code other than 0 fails the test; a time-out always does.
    """
    pool = _pools.pop((mpi, n), None)
    if pool is None:
        while len(_pools) >= POOLS:
            _pools.pop(next(iter(_pools))).close()
        pool = RankPool(n, mpi)
    try:
        done = pool.run(program, args, timeout)
    except BaseException:
        pool.kill()
        raise
    if pool.alive:
        _pools[mpi, n] = pool
    else:
        pool.kill()
    if check and done.code != 0:
        raise AssertionError(done.report())
    return done


def close_pools() -> None:
    """End all ranks that wait for programs."""
    pools = list(_pools.values())
    _pools.clear()
    for pool in pools:
        pool.dismiss()
    with contextlib.ExitStack() as stack:
        for pool in pools:
            stack.callback(pool.close)


class RankPool:
    """Running ranks that wait for programs.

    Args:
        n: number of ranks.
        mpi: one of `MPIS`.
    """

    def __init__(self, n: int, mpi: str) -> None:
        self.n = n
        self._programs = 0
        self._folder = tempfile.TemporaryDirectory(prefix="mpi-dasgd-pool-")
        self._directory = directory = Path(self._folder.name)
        for rank in range(n):
            os.mkfifo(directory / f"rank{rank}")
        # For reading, too: else this waits for the rank, without end if it does not come up.
        self._pipes = [os.open(directory / f"rank{rank}", os.O_RDWR) for rank in range(n)]
        command = [sys.executable, __file__, str(directory)]
        request = launch_request(command, n, mpi, timeout=None)
        self._helper = start_launch(directory, request)

    @property
    def alive(self) -> bool:
        """Whether the ranks still run."""
        return self._helper.poll() is None

    def run(self, program: str | Path, args: tuple[str, ...], timeout: float) -> Completed:
        """Run one program on all ranks."""
        self._programs += 1
        folder = self._directory / str(self._programs)
        folder.mkdir()
        file = Path(program) if str(program).endswith(".py") else folder / "program.py"
        if file.parent == folder:
            file.write_text(textwrap.dedent(str(program)))
        line = json.dumps({"folder": str(folder), "file": str(file.resolve()), "args": args})
        start = time.monotonic()
        for pipe in self._pipes:
            os.write(pipe, line.encode() + b"\n")
        limit = float("inf")  # for the others, once one has failed
        while len(codes := _codes(folder, self.n)) < self.n:
            seconds = time.monotonic() - start
            if seconds > timeout:
                stacks = self._stacks()
                done = self._completed(folder, codes, seconds)
                raise AssertionError(f"time limit of {timeout} s\n{done.report()}\n{stacks}")
            if any(codes.values()):
                limit = min(limit, seconds + GRACE)
            if seconds > limit or not self.alive:
                self._end()
                break
            time.sleep(0.005)
        return self._completed(folder, codes, time.monotonic() - start)

    def _completed(self, folder: Path, codes: dict[int, int], seconds: float) -> Completed:
        """What the ranks have left of a program; a rank that did not end it has no code."""
        failed = [rank for rank in codes if codes[rank]]
        outcome = Outcome(
            codes=tuple(codes.get(rank) for rank in range(self.n)),
            first_failed=failed[0] if failed else None,
            launcher_code=0,
            ended_by=None,
        )
        stdout, stderr = (
            "".join(
                path.read_text(errors="replace")
                for path in (folder / f"{rank}.{name}" for rank in range(self.n))
                if path.exists()
            )
            for name in ("out", "err")
        )
        if not self.alive:  # what the launcher and MPI itself have said
            stderr += (self._directory / "err").read_text(errors="replace")
        return Completed(
            code=outcome.code,
            message=outcome.describe(),
            codes=list(outcome.codes),
            stdout=stdout,
            stderr=stderr,
            seconds=seconds,
        )

    def _stacks(self) -> str:
        """Stacks of all threads of the ranks that are up."""
        ranks = [json.loads(file.read_text()) for file in self._directory.glob("*.rank")]
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank["pid"], signal.SIGUSR2)
        time.sleep(1)
        return "\n".join(
            f"--- stacks of rank {rank['rank']} ---\n{Path(rank['stacks']).read_text()}"
            for rank in sorted(ranks, key=lambda rank: rank["rank"])
            if Path(rank["stacks"]).exists()
        )

    def close(self) -> None:
        """Let the ranks end; it is an error if they do not end well."""
        self.dismiss()
        try:
            code = self._helper.wait(30)
        except subprocess.TimeoutExpired:
            stacks = self._stacks()
            self.kill()
            raise AssertionError(f"ranks of a pool did not end\n{stacks}") from None
        answer = self._directory / "answer"
        text = answer.read_text() if answer.exists() else ""
        said = (self._directory / "err").read_text(errors="replace")
        self._folder.cleanup()
        assert code == 0 and json.loads(text)["code"] == 0, f"{code} {text}\n{said}"

    def kill(self) -> None:
        """End the ranks, whatever they do, and remove what they have left."""
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        self.dismiss()
        # `launch` passes the first signal on to the ranks, and kills them at the second.
        for end in (self._helper.terminate, self._helper.terminate, self._helper.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._helper.wait(8)
                break
        self._helper.wait()

    def dismiss(self) -> None:
        """Say that no more programs will come: the ranks end by themselves."""
        while self._pipes:
            os.close(self._pipes.pop())


def _codes(folder: Path, n: int) -> dict[int, int]:
    """Exit codes so far, in the order in which the ranks ended the program."""
    files = [folder / f"{rank}.code" for rank in range(n)]
    ended = sorted((f for f in files if f.exists()), key=lambda f: f.stat().st_mtime_ns)
    return {int(file.stem): int(file.read_text()) for file in ended}


# In the ranks


def _serve(directory: Path) -> None:
    """Run what comes through the pipe until it is closed."""
    enable_stack_dump()
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    hello = {"rank": rank, "pid": os.getpid(), "stacks": os.environ["MPI_DASGD_STACKS"]}
    _write(directory / f"{rank}.rank", json.dumps(hello))
    with (directory / f"rank{rank}").open() as requests:
        while line := requests.readline():
            request = json.loads(line)
            folder = Path(request["folder"])
            with _output(folder, rank), _as_before():
                code = _run(request["file"], request["args"])
            _write(folder / f"{rank}.code", str(code))


def _run(file: str, args: list[str]) -> int:
    """Run a file as the main program; return its exit code."""
    sys.argv = [file, *args]
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _output(folder: Path, rank: int) -> Iterator[None]:
    """Have what this process prints in files, that of libraries as well."""
    kept = {}
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        kept[stream] = os.dup(stream.fileno())
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
        os.close(file)
    try:
        yield
    finally:
        for stream, before in kept.items():
            stream.flush()
            os.dup2(before, stream.fileno())
            os.close(before)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what programs change of their process."""
    environment, directory, path = dict(os.environ), Path.cwd(), list(sys.path)
    hooks = sys.excepthook, threading.excepthook
    interval = sys.getswitchinterval()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.path[:] = path
        sys.excepthook, threading.excepthook = hooks
        sys.setswitchinterval(interval)
        gc.collect()


def _write(file: Path, text: str) -> None:
    """Write a file that is whole when it is seen."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.rename(file)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
