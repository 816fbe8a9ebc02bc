"""``bench gpu order``: words move only when the device has done what was asked for before them.

Each round asks the device for slow work that ends with a number in memory of the host, and then for
a swap of a word. A word that has moved before the number is there has moved too early. A release
that swaps at once is the control: its words must be seen to be early, or nothing is proved.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpi_dasgd.bench.gpu_device import require_gpu
from mpi_dasgd.bench.options import add_output_options
from mpi_dasgd.bench.sample_store import columns_of, samples_path, write_samples
from mpi_dasgd.device.base import Device
from mpi_dasgd.errors import DeviceFailed, UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.training.device_stream import CudaStream
from mpi_dasgd.transport.release import Immediate, Release
from mpi_dasgd.transport.rma.launched_release import Launched

__all__ = ["HostWords", "Round", "Work", "main", "measure", "summarize"]

Work = Callable[[int, bool], None]
"""Asks the device to write a number, 1, 2, ..., after slow work or at once (False)."""

_ROUNDS = 200
_SLOW_SECONDS = 2e-3  # of the work of a round: hundreds of times a swap
_TIMEOUT_SECONDS = 20.0  # for one word
_CONTROL_SHARE = 0.95  # of the control's words that must be early: a host may be interrupted


@dataclass(frozen=True)
class Round:
    """One swap of a word.

    Attributes:
        release: ``launched``, ``idle`` (launched, behind work that is not slow) or ``immediate``.
        early: whether the word had moved before the device had done its work.
        latency_s: from the time when the work was seen done to that when the word had moved.
        flush_s: time of the host to have the swap made.
        total_s: from the call of `Release.flush` to the time when the word had moved.
    """

    release: str
    early: bool
    latency_s: float
    flush_s: float
    total_s: float


class HostWords:
    """Control words in memory of this process.

    Args:
        count: number of words.
        library: the native library.
    """

    def __init__(self, count: int, library: ctypes.CDLL) -> None:
        self._memory = np.zeros(count, np.int64)
        self._read, self._swap = library.mpd_word_read, library.mpd_word_swap
        self._read.argtypes, self._read.restype = [ctypes.c_void_p], ctypes.c_int64
        self._swap.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        self._swap.restype = ctypes.c_int

    def address(self, rank: int, index: int) -> int:
        """Return where word `index` is; all ranks are this one."""
        return self._memory.ctypes.data + 8 * index

    def read(self, rank: int, index: int) -> int:
        """Return word `index`, atomically."""
        return int(self._read(self.address(rank, index)))

    def swap(self, rank: int, index: int, expected: int, new: int) -> bool:
        """Set a word to `new` if it is `expected`, atomically; return whether it was."""
        return bool(self._swap(self.address(rank, index), expected, new))


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its command-line arguments.

    Returns:
        0; 1 if a word was early, or if the control was not.

    Raises:
        UserError: an argument is wrong, or there are no GPU, no CuPy or no native kernels.
    """
    options = _parser().parse_args(arguments)
    if options.rounds < 1:
        raise UserError(f"bench gpu order: --rounds must be at least 1, got {options.rounds}")
    card = require_gpu("bench gpu order")
    library = native.load()
    if library is None:
        raise UserError(f"bench gpu order: the host function is native code: {native.status()}")
    path = samples_path("gpu-order", options.out)
    device, work, written = _cuda()
    rounds = measure(device, work, written, library, options.rounds)
    summary = summarize(rounds)
    settings = {"device": card, "slow_seconds": _SLOW_SECONDS}
    write_samples(path, "gpu-order", columns_of(map(vars, rounds)), settings)
    if options.json:
        print(json.dumps({**settings, **summary, "samples": str(path)}), flush=True)
    else:
        print(f"raw samples: {path}\n{_line(summary, card)}", flush=True)
    return 0 if summary["in_order"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpi-dasgd bench gpu order",
        description="Words move only when the device has done what was asked for before them.",
    )
    parser.add_argument(
        "--rounds", type=int, default=_ROUNDS, help=f"words of each kind [{_ROUNDS}]"
    )
    add_output_options(parser)
    return parser


def _cuda() -> tuple[Device, Work, np.ndarray]:
    """Return the GPU, work for it, and what that writes, (1,), as the host sees it.

    Raises:
        UserError: CuPy is not installed.
    """
    from mpi_dasgd.device.cuda import CudaDevice

    try:
        device = CudaDevice(0)
    except ImportError as error:
        raise UserError(
            "bench gpu order: CuPy is not installed: pip install 'mpi_dasgd[cuda13]', or cuda12"
        ) from error
    stream = CudaStream(device.name)
    target, written = device.mapped((1,), np.dtype(np.int64))

    def work(number: int, slow: bool) -> None:
        if slow:
            stream.keep_busy(_SLOW_SECONDS)
        with device.current_stream():
            target.fill(number)

    stream.keep_busy(_SLOW_SECONDS)  # the first call measures the clock
    with device.current_stream():
        target.fill(-1)  # the first call compiles
    return device, work, written


def measure(
    device: Device, work: Work, written: np.ndarray, library: ctypes.CDLL, rounds: int
) -> list[Round]:
    """Swap words behind slow work, behind quick work, and, as the control, at once.

    Args:
        device: the device.
        work: asks it for work.
        written: what the work writes, (1,), int64, as the host sees it.
        library: the native library.
        rounds: swaps of each kind.

    Raises:
        DeviceFailed: a word has not moved for 20 s.
    """
    words = HostWords(1, library)
    node_words: Any = words  # of which a release needs the addresses
    launched, immediate = Launched(node_words, device, library), Immediate(words)
    plan: list[tuple[str, Release]] = [("launched", launched), ("idle", launched)]
    number = 0
    results = []
    for name, release in [*plan, ("immediate", immediate)]:
        for _ in range(rounds):
            number += 1
            work(number, name != "idle")
            results.append(_swap(name, release, words, device, written, number))
    return results


def _swap(
    name: str,
    release: Release,
    words: HostWords,
    device: Device,
    written: np.ndarray,
    number: int,
) -> Round:
    """Have the word become `number` behind the work asked for, and watch it."""
    mark = device.mark()
    started = time.perf_counter()
    release.swap(0, 0, number - 1, number, required=True)
    release.flush()
    flushed = time.perf_counter()
    passed: float | None = None
    while True:
        has_moved = words.read(0, 0) == number  # looked at before the mark: it must be passed then
        now = time.perf_counter()
        if passed is None and mark.is_done:
            passed = time.perf_counter()
        if has_moved:
            break
        if now - started > _TIMEOUT_SECONDS:
            raise DeviceFailed(f"{device.name}: a word has not moved for {_TIMEOUT_SECONDS:g} s")
    early = passed is None or int(written[0]) != number
    mark.wait()
    return Round(
        release=name,
        early=early,
        latency_s=0.0 if passed is None else max(0.0, now - passed),
        flush_s=flushed - started,
        total_s=now - started,
    )


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return counts of early words, whether all is in order, and times in microseconds."""
    by_release = {
        name: [r for r in rounds if r.release == name] for name in ("launched", "idle", "immediate")
    }
    early = {name: sum(r.early for r in group) for name, group in by_release.items()}
    count = len(by_release["launched"])
    latency = 1e6 * np.array([r.latency_s for r in by_release["launched"]])
    idle = 1e6 * np.array([r.total_s for r in by_release["idle"]])
    flush = 1e6 * np.array([r.flush_s for r in by_release["launched"]])
    return {
        "rounds": count,
        "early": early["launched"] + early["idle"],
        "control_early": early["immediate"],
        "in_order": early["launched"] + early["idle"] == 0
        and early["immediate"] >= _CONTROL_SHARE * count,
        "latency_median_us": float(np.median(latency)),
        "latency_p99_us": float(np.percentile(latency, 99)),
        "idle_median_us": float(np.median(idle)),
        "idle_p99_us": float(np.percentile(idle, 99)),
        "flush_median_us": float(np.median(flush)),
    }


def _line(summary: dict[str, Any], card: str) -> str:
    """Return the line of the table."""
    verdict = "ok" if summary["in_order"] else "WRONG"
    return (
        f"ORDER {verdict} on {card}: {summary['early']} of {2 * summary['rounds']} words moved "
        f"before their mark, {summary['control_early']} of {summary['rounds']} of the control; "
        f"host function {summary['latency_median_us']:.0f} us, p99 "
        f"{summary['latency_p99_us']:.0f}; from flush to word on an idle device "
        f"{summary['idle_median_us']:.0f} us, p99 {summary['idle_p99_us']:.0f}; flush itself "
        f"{summary['flush_median_us']:.0f} us"
    )
