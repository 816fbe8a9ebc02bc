"""Starts the ranks of tests as copies of a process that has imported torch.

To import torch and to make an optimizer takes three seconds of a core, in every rank of every job:
more than most tests use otherwise. So a launcher starts ``warm_start.py SOCKET FILE ARGUMENT...``
instead of ``FILE ARGUMENT...``. This *proxy* has the *server* (`warm_server.py`), of which each
pytest process has one, fork. The copy takes over the proxy's file descriptors, variables, working
directory, namespaces, limits and ignored signals, and runs the file. The proxy passes signals on
and ends as the copy does; if it is killed, the copy is. Neither MPI nor `mpi_dasgd` is imported in
a copy before the file runs.

A rank with other variables that are heeded early, such as OMP_NUM_THREADS, is a process of its own.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import subprocess

__all__ = ["LENGTH", "LIMITS", "NUMBER", "WarmServer", "receive", "warm_command"]

LIMITS = (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_STACK)
LENGTH = struct.Struct("!I")
"""Of a request, before it."""

NUMBER = struct.Struct("!i")
"""Of an answer: the copy's process id, 0 if there is none, and later how it ended."""

_SERVER = os.path.join(os.path.dirname(__file__), "warm_server.py")  # noqa: PTH118, PTH120
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WarmServer:
    """The server of this process, with which it ends.

    Args:
        environment: variables of all ranks.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        import subprocess
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="mpi-dasgd-warm-")
        self.socket = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.socket)
            listener.listen(128)
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, _SERVER, str(listener.fileno())],
                env=environment,
                stdin=subprocess.PIPE,  # it ends when that is closed
                stdout=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C is none of its business
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the server of ranks ended with {self._process.wait()}")

    def command(self, command: list[str]) -> list[str]:
        """Return what to start instead of ``[sys.executable, FILE, ARGUMENT...]``."""
        return warm_command(self.socket, command)

    def close(self) -> None:
        """End the server; what it has started goes on."""
        self._process.communicate()
        self._folder.cleanup()


def warm_command(socket_name: str, command: list[str]) -> list[str]:
    """Return what to start instead of ``[sys.executable, FILE, ARGUMENT...]``."""
    python, *rest = command
    assert python == sys.executable
    return [python, "-IS", __file__, socket_name, *rest]


# In the proxy


def _proxy(name: str, rest: list[str]) -> NoReturn:
    """Have the server run a file; end as it does. Run it here if the server refuses."""
    copy = 0
    early: list[int] = []

    def forward(signum: int, _: object) -> None:
        if copy:
            with contextlib.suppress(ProcessLookupError):
                os.kill(copy, signum)
        else:
            early.append(signum)

    ignored = [int(s) for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN]
    numbers = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_inherited(fd)]  # noqa: PTH208
    lifeline, _held_open = os.pipe()
    request = {
        "files": numbers,
        "arguments": rest,
        "environment": dict(os.environ),
        "directory": os.getcwd(),  # noqa: PTH109
        "umask": _umask(),
        "cores": sorted(os.sched_getaffinity(0)),
        "limits": [resource.getrlimit(limit) for limit in LIMITS],
        "ignored": ignored,
        "pid": os.getpid(),
    }
    for signum in _FORWARDED:
        if signum not in ignored:
            signal.signal(signum, forward)
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(name)
            send(server, json.dumps(request).encode(), [*numbers, lifeline])
            copy = NUMBER.unpack(receive(server, NUMBER.size))[0]
        except OSError:
            pass  # the server has ended
        os.close(lifeline)
        if not copy:
            _run_here(rest, ignored, early)
        for signum in early:
            forward(signum, None)
        status = NUMBER.unpack(receive(server, NUMBER.size))[0]
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signum = os.WTERMSIG(status)
        if signum != signal.SIGKILL:
            signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    os._exit(os.WEXITSTATUS(status))


def _run_here(rest: list[str], ignored: list[int], early: list[int]) -> NoReturn:
    """Become a new process that runs the file, with the signals that have come."""
    for signum in _FORWARDED:
        if signum not in ignored:
            signal.signal(signum, signal.SIG_DFL)
    for signum in early:
        os.kill(os.getpid(), signum)
    os.execv(sys.executable, [sys.executable, *rest])


def _is_inherited(fd: int) -> bool:
    """Return whether a new process would have it; that of the listing itself is closed already."""
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Messages


def send(to: socket.socket, message: bytes, files: list[int]) -> None:
    """Send a message, and file descriptors."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    to.sendmsg([LENGTH.pack(len(message))], rights)
    to.sendall(message)


def receive(source: socket.socket, size: int) -> bytes:
    """Receive that many bytes.

    Raises:
        ConnectionError: the other side has ended.
    """
    data = b""
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side has ended")
        data += part
    return data


if __name__ == "__main__":
    _proxy(sys.argv[1], sys.argv[2:])
