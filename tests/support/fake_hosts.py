"""Fake hosts on one machine: network, UTS, IPC and mount namespaces, joined by a bridge.

Between real hosts there is no shared memory, and over TCP no one-sided operation completes while
the target is outside MPI. On one host it does, so that only such hosts show whether a program makes
its own progress. Needs root, and Debian's `iproute2` and `util-linux`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.mpi_ranks import missing

# $1: name, $2: hosts file. A fresh /sys, as MPI libraries look for network devices in it.
_HOST = """\
set -e
echo "$1" >/proc/sys/kernel/hostname
mount -t sysfs sysfs /sys
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
exec sleep infinity
"""

_SWITCH = """\
set -e
ip link add switch type bridge
ip link set switch up
echo ready
exec sleep infinity
"""

# Called as ssh is: options, host, then words that a shell joins. $0 is the directory with the pids.
_AGENT = """\
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
pid=$(cat "DIRECTORY/$1.pid") || exit 255
shift
exec nsenter -t "$pid" -n -u -i -m -- sh -c "$*"
"""


@dataclass(frozen=True)
class Hosts:
    """Running fake hosts.

    Attributes:
        names: their host names.
        agent: program that runs a command on one: ``agent HOST COMMAND...``.
        pids: a process in each.
    """

    names: list[str]
    agent: Path
    pids: list[int]

    def enter(self, index: int) -> list[str]:
        """Command prefix that runs what follows on host `index`."""
        return ["nsenter", "-t", str(self.pids[index]), "-n", "-u", "-i", "-m", "--"]


@contextlib.contextmanager
def isolated_hosts(k: int) -> Iterator[Hosts]:
    """Set up `k` fake hosts; skips the test where that cannot be done (in CI: fails).

    Every address lives in a namespace of its own run, so that runs beside each other do not meet.
    """
    if os.geteuid() != 0:
        missing("fake hosts need root")
    for tool in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(tool) is None:
            missing(f"fake hosts need `{tool}`: `make test` installs it on Debian")
    if subprocess.run(["unshare", "-n", "-m", "true"], check=False, capture_output=True).returncode:
        missing("fake hosts need the right to make namespaces")
    suffix = secrets.token_hex(3)
    names = [f"dasgd{i}-{suffix}" for i in range(k)]
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory(prefix="mpi-dasgd-hosts-") as name:
        directory = Path(name)
        addresses = [f"10.213.7.{i + 1}" for i in range(k)]
        lines = ["127.0.0.1 localhost", *map(" ".join, zip(addresses, names, strict=True))]
        (directory / "hosts").write_text("\n".join(lines) + "\n")
        agent = directory / "ssh"
        agent.write_text(_AGENT.replace("DIRECTORY", name))
        agent.chmod(0o755)
        try:
            switch = _start(["-n"], _SWITCH)
            processes.append(switch)
            for i, (host, address) in enumerate(zip(names, addresses, strict=True)):
                process = _start(["-n", "-u", "-i", "-m"], _HOST, host, str(directory / "hosts"))
                processes.append(process)
                (directory / f"{host}.pid").write_text(str(process.pid))
                ends = f"host{i} type veth peer name eth0 netns {process.pid}"
                _ip(switch.pid, f"link add {ends}")
                _ip(switch.pid, f"link set host{i} master switch up")
                _ip(process.pid, f"addr add {address}/24 dev eth0")
                _ip(process.pid, "link set eth0 up")
            yield Hosts(names, agent, [process.pid for process in processes[1:]])
        finally:
            _end(processes)


def _start(namespaces: list[str], script: str, *args: str) -> subprocess.Popen[str]:
    """Run a script in new namespaces until it says "ready"; it ends when this process does."""
    process = subprocess.Popen(
        ["unshare", *namespaces, "setpriv", "--pdeathsig", "KILL", "sh", "-c", script, "sh", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        process.wait()
        raise RuntimeError(f"a fake host did not come up: {namespaces} {args}")
    return process


def _ip(pid: int, arguments: str) -> None:
    """Run ``ip ARGUMENTS`` in the network of a process."""
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *arguments.split()], check=True)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    """Kill all processes in the namespaces of `processes`; with the last a namespace vanishes."""
    networks = {_network(process.pid) for process in processes} - {_network(os.getpid())}
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        if _network(pid) in networks - {""}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _network(pid: int) -> str:
    """Name of the network namespace of a process; "" if it has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""
