"""Probe of CUDA IPC: whether a process's kernels can read and write another one's GPU memory.

Whether they can is decided by driver, container, scheduler and board, and where they cannot, the
answer may be a crash. So it is tried, in processes of its own: each exports memory of its GPU, all
others read it and write to it, and every byte is verified.

    python -m mpi_dasgd.device.ipc_probe [--kill-owner] [DEVICE ...]

prints ``IPC ok ...`` or ``IPC fails ...`` as its last line. A device that is named once is probed
with the others, one that is named twice, or is alone, by two processes that share it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mpi_dasgd
from mpi_dasgd.device.binding import slice_of
from mpi_dasgd.device.probe_process import ProbeFailure, ProbeProcess

__all__ = ["ProbeDevice", "Rates", "Verdict", "main", "probe"]

TIMEOUT = 60.0
"""Seconds for a whole probe; it takes about ten."""

_COMMAND = (sys.executable, "-m", "mpi_dasgd.device.ipc_probe", "child")
_NVLINK_RATE = 150.0  # GB/s; less is read over PCIe
_DYING_SECONDS = 0.5  # until the driver has cleared up behind a process that was killed


@dataclass(frozen=True)
class ProbeDevice:
    """A GPU as one process sees it.

    Attributes:
        index: its number among those that the process sees.
        bus_id: its PCI bus id, by which a child makes sure that it sees the same one; "" if that is
            not known.
        setting: the process's CUDA_VISIBLE_DEVICES; None if that is not set.
    """

    index: int
    bus_id: str = ""
    setting: str | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"GPU {self.bus_id or self.index}"

    @property
    def identity(self) -> str:
        """What other processes' numbers of the same GPU, or slice of one, have in common."""
        return f"{self.bus_id or self.index} {slice_of(self.setting, self.index)}"


@dataclass(frozen=True)
class Rates:
    """Rates of a kernel that copies, of the slowest pair of processes, GB/s.

    Attributes:
        read: from another process's memory.
        write: to another process's memory.
        local: within its own.
    """

    read: float
    write: float
    local: float


@dataclass(frozen=True)
class Verdict:
    """What a probe has found.

    Attributes:
        works: whether all pairs of processes read and wrote every byte right.
        reason: what was found, for users to read.
        rates: how fast; None if it does not work.
        after_death: what a reader found in the memory of an owner that was killed; "" if not tried.
    """

    works: bool
    reason: str
    rates: Rates | None = None
    after_death: str = ""


def probe(
    devices: Sequence[ProbeDevice],
    timeout: float = TIMEOUT,
    *,
    command: Sequence[str] = _COMMAND,
    kill_owner: bool = False,
) -> Verdict:
    """Probe all ordered pairs of `devices`. Whatever the children do, this returns a verdict.

    Args:
        devices: the GPU of each rank of this node.
        timeout: seconds for all of it.
        command: program of a child, to which index and bus id are appended.
        kill_owner: also kill a process, and look whether its memory can still be read.
    """
    deadline = time.monotonic() + timeout
    children: list[_Child] = []
    with ExitStack() as stack:
        try:
            for number, device in enumerate(_devices_of_children(devices)):
                children.append(_Child(number, device, command))
                stack.callback(children[-1].process.close)
            for child in children:
                child.tell(do="start", key=_key(child.number, child.number))
            for child in children:
                child.handle = str(child.process.hear("start", deadline).get("handle", ""))
            pairs = [
                _probe_pair(owner, reader, deadline)
                for owner, reader in itertools.permutations(children, 2)
            ]
            after_death = _kill_and_read(children[0], children[1], deadline) if kill_owner else ""
        except ProbeFailure as failure:
            for child in children:  # some may hang
                child.process.kill()
            return Verdict(False, f"the probe of CUDA IPC failed: {failure}{_hint(str(failure))}")
    slowest = Rates(*(min(rates) for rates in zip(*pairs, strict=True)))
    way = "" if slowest.read >= _NVLINK_RATE else "; that is over PCIe, where exchanges take longer"
    text = (
        f"kernels read the memory of other processes at {slowest.read:.0f} GB/s and write it at "
        f"{slowest.write:.0f} GB/s (their own: {slowest.local:.0f} GB/s){way}"
    )
    return Verdict(True, text, slowest, after_death)


def _devices_of_children(devices: Sequence[ProbeDevice]) -> list[ProbeDevice]:
    """Return one device per process: twice those that several ranks share, or that are alone."""
    assert devices, "no device to probe"
    first: dict[str, ProbeDevice] = {}
    uses: Counter[str] = Counter()
    for device in devices:
        first.setdefault(device.identity, device)
        uses[device.identity] += 1
    shared = [first[key] for key in first if uses[key] > 1 or len(first) == 1]
    return [*first.values(), *shared]


class _Child:
    """A process of the probe, with a region that the others open."""

    def __init__(self, number: int, device: ProbeDevice, command: Sequence[str]) -> None:
        self.number = number
        self.name = device.name
        self.handle = ""
        environment = dict(os.environ)
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if device.setting is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device.setting
        # The package as this process has found it, wherever that was.
        here = str(Path(mpi_dasgd.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [here, os.environ.get("PYTHONPATH")])
        )
        arguments = [*command, str(device.index), device.bus_id]
        self.process = ProbeProcess(f"process {number} on {device.name}", arguments, environment)

    def tell(self, **request: object) -> None:
        self.process.tell(request)


def _key(owner: int, writer: int) -> int:
    """Return the number that determines the bytes which `writer` writes to `owner`'s region."""
    return (owner + 1) * 65537 + writer


def _probe_pair(owner: _Child, reader: _Child, deadline: float) -> tuple[float, float, float]:
    """Have one process read and write another one's region; return the rates.

    Raises:
        ProbeFailure: it cannot, or not right.
    """
    what = f"use of memory of process {owner.number} on {owner.name}"
    written = _key(owner.number, reader.number)
    reader.tell(
        do="use", handle=owner.handle, read_key=_key(owner.number, owner.number), write_key=written
    )
    used = reader.process.hear(what, deadline)
    owner.tell(do="check", key=written)
    found = owner.process.hear(f"check of what process {reader.number} wrote", deadline)
    try:
        if int(used["wrong"]) or int(found["wrong"]):
            raise ProbeFailure(
                f"kernels on {reader.name} read {used['wrong']} wrong words from memory of "
                f"{owner.name}, and {found['wrong']} of those that they wrote arrived wrong"
            )
        return float(used["read"]), float(used["write"]), float(used["local"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProbeFailure(f"{what}: an answer makes no sense ({used}, {found})") from error


def _kill_and_read(owner: _Child, reader: _Child, deadline: float) -> str:
    """Kill a process whose region is open in another one, and have that read it.

    Raises:
        ProbeFailure: the reader did not survive it.
    """
    reader.tell(do="open", handle=owner.handle)
    reader.process.hear("opening a region", deadline)
    owner.process.kill()
    time.sleep(_DYING_SECONDS)
    reader.tell(do="read", key=_key(owner.number, owner.number))
    try:
        answer = reader.process.hear("reading a dead process's memory", deadline)
    except ProbeFailure as failure:
        return f"not readable: {failure}"
    return "changed" if answer.get("wrong") else "readable"


def _hint(failure: str) -> str:
    """Return what to do about a failure, if it is a known one."""
    if "no module named" in failure.lower():
        return "; install CuPy for your CUDA (`pip install cupy-cuda13x`)"
    if "busy or unavailable" in failure:
        return (
            "; the GPU is in exclusive mode, in which no process but the rank can use it, and so "
            "not try it: `nvidia-smi -c DEFAULT`"
        )
    if "another GPU" in failure or "invalid device ordinal" in failure.lower():
        return (
            "; the GPUs are hidden from the other ranks, as by --gpus-per-task: ask for "
            "--gpus-per-node instead"
        )
    if "IpcOpenMemHandle" in failure:
        return (
            "; start a container with --ipc=host, and ask the scheduler for --gpus-per-node "
            "instead of --gpus-per-task"
        )
    return ""


def main(arguments: Sequence[str]) -> int:
    """Probe as a program; return 0 if CUDA IPC works, else 3."""
    parser = argparse.ArgumentParser(prog="python -m mpi_dasgd.device.ipc_probe")
    parser.add_argument("devices", nargs="*", type=int, metavar="DEVICE", help="number [0]")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for all [60]")
    parser.add_argument(
        "--kill-owner", action="store_true", help="also look at the memory of a process that died"
    )
    options = parser.parse_args(arguments)
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [ProbeDevice(index, setting=setting) for index in options.devices or [0]]
    verdict = probe(devices, options.timeout, kill_owner=options.kill_owner)
    after_death = f"; owner killed: memory {verdict.after_death}" if verdict.after_death else ""
    print(f"IPC {'ok' if verdict.works else 'fails'}: {verdict.reason}{after_death}", flush=True)
    return 0 if verdict.works else 3


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        from mpi_dasgd.device.ipc_probe_child import main as child

        sys.exit(child(int(sys.argv[2]), sys.argv[3]))
    sys.exit(main(sys.argv[1:]))
