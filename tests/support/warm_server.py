"""The process of which the ranks of tests are copies: see `warm_start.py`.

``warm_server.py FD``: with the socket at which proxies connect. It prints "ready" when it has
imported, and ends when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

from tests.support.warm_start import LENGTH, LIMITS, NUMBER, receive

# Beginnings of variables that are heeded when a process starts, or imports what is imported here.
# Others are read when they are used: a copy takes them over, as those of launchers and of MPI.
_HEEDED_EARLY = (
    *("LD_PRELOAD", "LD_AUDIT", "LD_BIND", "GLIBC_", "MALLOC_", "LANG", "LC_ALL", "TZ", "PYTHON"),
    *("OMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "TORCH_", "PYTORCH_JIT", "ATEN_"),
    *("NPY_", "NUMPY_", "SCIPY_", "HDF5_", "PYDANTIC_"),
)
_environment = dict(os.environ)  # as it was: what is imported here sets some more
_NAMESPACES = ("net", "uts", "ipc", "mnt")
_HIGH = 500  # file descriptors from here on are in nobody's way
_F_SETSIG = 10  # of fcntl(2)


class _Server:
    """Forks whenever a proxy asks for it.

    Args:
        listener: where proxies connect.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._proxies: dict[int, tuple[int, socket.socket]] = {}  # copies, by their pidfd
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._poll.register(listener, select.POLLIN)

    def serve(self) -> list[str]:
        """Fork until the standard input is closed, which ends this process.

        Returns:
            In a copy: the file to run, and its arguments.
        """
        while True:
            for fd, _ in self._poll.poll():
                if fd == 0:
                    os._exit(0)
                if fd in self._proxies:
                    self._tell_end(fd)
                elif (request := self._accept()) is not None:
                    return request

    def _tell_end(self, pidfd: int) -> None:
        """Tell the proxy of a copy how that has ended."""
        self._poll.unregister(pidfd)
        pid, proxy = self._proxies.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        with proxy, contextlib.suppress(OSError):  # it may have been killed
            proxy.sendall(NUMBER.pack(status))

    def _accept(self) -> list[str] | None:
        """Fork, if the next proxy can have a copy; return what `serve` does in the copy."""
        proxy, _ = self._listener.accept()
        files: list[int] = []
        try:
            head, files, _, _ = socket.recv_fds(proxy, LENGTH.size, 250)
            request = json.loads(receive(proxy, *LENGTH.unpack(head)))
        except (OSError, struct.error):  # it has been killed
            proxy.close()
        else:
            if not _is_warm(request["environment"]):
                with proxy, contextlib.suppress(OSError):
                    proxy.sendall(NUMBER.pack(0))
            elif (pid := os.fork()) == 0:
                proxies = [proxy for _, proxy in self._proxies.values()]
                for mine in (self._listener, proxy, *proxies):
                    mine.detach()  # or it would close what comes into its place
                _become(request, files)
                return request["arguments"]  # type: ignore[no-any-return]
            else:
                pidfd = os.pidfd_open(pid)
                self._proxies[pidfd] = pid, proxy
                self._poll.register(pidfd, select.POLLIN)
                with contextlib.suppress(OSError):
                    proxy.sendall(NUMBER.pack(pid))
        for file in files:
            os.close(file)
        return None


def _is_warm(environment: dict[str, str]) -> bool:
    """Return whether a copy can take over these variables."""
    changed = {name for name, _ in _environment.items() ^ environment.items()}
    return not any(name.startswith(_HEEDED_EARLY) for name in changed)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Make this process what the proxy is that has sent `request`."""
    _join_namespaces(request["pid"])
    *files, lifeline = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for fd in files]
    os.closerange(3, _HIGH)
    for fd, number in zip(files, request["files"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    _show_environment()
    if stage := os.environ.get("MPI_DASGD_STAGE"):  # `launch` knows a rank by its process id
        with open(f"{stage.removesuffix('stage')}pid", "w") as file:  # noqa: PTH123
            file.write(f"{os.uname().nodename} {os.getpid()}\n")
    os.chdir(request["directory"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    for limit, values in zip(LIMITS, request["limits"], strict=True):
        resource.setrlimit(limit, values)
    for signum in signal.valid_signals():
        if signum in request["ignored"]:
            signal.signal(signum, signal.SIG_IGN)
        elif signal.getsignal(signum) is signal.SIG_IGN:  # pytest runs in the background
            is_interrupt = signum == signal.SIGINT
            signal.signal(signum, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    # This process is killed when the other end is closed: when the proxy ends.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGKILL)  # it had ended before
    import random

    import numpy as np

    random.seed()  # a new process has seeds of its own
    np.random.seed()


def _join_namespaces(pid: int) -> None:
    """Join the namespaces of another process."""
    for name in _NAMESPACES:
        theirs = f"/proc/{pid}/ns/{name}"
        if os.readlink(theirs) != os.readlink(f"/proc/self/ns/{name}"):  # noqa: PTH115
            fd = os.open(theirs, os.O_RDONLY | os.O_CLOEXEC)
            if ctypes.CDLL(None, use_errno=True).setns(fd, 0):
                raise OSError(ctypes.get_errno(), f"setns: {theirs}")
            os.close(fd)


def _show_environment() -> None:
    """Have ``/proc/PID/environ`` show variables of `launch`, which knows its processes by them."""
    with open("/proc/self/stat") as stat:  # noqa: PTH123
        start, end = map(int, stat.read().rpartition(")")[2].split()[47:49])  # see proc(5)
    ours = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MPI_DASGD_")]
    block = "\0".join([*ours, ""]).encode()
    assert len(block) <= end - start, "the server has too few variables"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, block, len(block))


def _import_all() -> None:
    """Import what every rank that trains does, of other packages.

    Raises:
        RuntimeError: there are threads, which a copy would not have.
    """
    import gc

    import h5py  # noqa: F401
    import pydantic  # noqa: F401
    import scipy.sparse.csgraph
    import scipy.sparse.linalg  # noqa: F401
    import torch

    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # imports as much again
    if (threads := len(os.listdir("/proc/self/task"))) > 1:  # noqa: PTH208
        raise RuntimeError(f"warm start: {threads} threads run after the imports")
    gc.freeze()


def _run(file: str, *arguments: str) -> None:
    """Run a file as Python does."""
    from types import ModuleType

    sys.argv = [file, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.path.insert(0, os.path.dirname(file))  # noqa: PTH120
    main = ModuleType("__main__")
    main.__file__ = file
    main.__warm__ = sys.modules["__main__"]  # type: ignore[attr-defined]  # it must not be freed
    sys.modules["__main__"] = main
    with open(file, "rb") as opened:  # noqa: PTH123
        code = opened.read()
    exec(compile(code, file, "exec"), main.__dict__)


if __name__ == "__main__":
    sys.path.pop(0)
    _import_all()
    print("ready")
    _run(*_Server(socket.socket(fileno=int(sys.argv[1]))).serve())
