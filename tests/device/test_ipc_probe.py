"""The probe of CUDA IPC: real processes on regions of the host, and what may go wrong in them."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpi_dasgd.device import ipc_probe, ipc_probe_child
from mpi_dasgd.device.ipc_probe import ProbeDevice, Rates, Verdict, probe
from mpi_dasgd.device.probe_process import ANSWER_MARK
from tests.kernels.test_cuda_compile import _nvrtc
from tests.support.fake_cuda import FakeCuda, build_libcuda
from tests.support.mpi_ranks import ROOT

CHILD = str(ROOT / "tests" / "programs" / "ipc_child.py")
TWO = [ProbeDevice(0, "0000:01:00.0", "0,1"), ProbeDevice(1, "0000:02:00.0", "0,1")]


def _probe(
    folder: Path,
    mode: str,
    devices: list[ProbeDevice] | None = None,
    timeout: float = 30.0,
    kill_owner: bool = False,
) -> Verdict:
    command = (sys.executable, CHILD, mode, str(folder))
    return probe(devices or TWO, timeout, command=command, kill_owner=kill_owner)


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every child that a test starts has ended when the test has."""
    started: list[subprocess.Popen] = []
    original = subprocess.Popen.__init__

    def init(self: subprocess.Popen, *args: Any, **options: Any) -> None:
        started.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", init)
    yield
    for process in started:
        pid = getattr(process, "pid", None)
        assert pid is None or not Path(f"/proc/{pid}").exists()


def test_two_processes_read_and_write_each_other(tmp_path: Path) -> None:
    verdict = _probe(tmp_path, "good", kill_owner=True)
    assert verdict.works, verdict.reason
    assert verdict.rates == Rates(1000, 1000, 1000)
    assert verdict.after_death == "readable"  # a file stays
    assert verdict.reason.startswith("kernels read the memory of other processes at 1000 GB/s")


def test_a_slow_link_works_and_is_named(tmp_path: Path) -> None:
    verdict = _probe(tmp_path, "slow")
    assert verdict.works and "over PCIe" in verdict.reason


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("wrong bytes", "wrong words"),
        ("crash", "killed by SIGSEGV"),
        ("raise", "start a container with --ipc=host"),
        ("exit", "ended with exit code 1 (ImportError: no module named 'cupy'); install CuPy"),
        ("garbage", "start: ended with exit code 0"),
        ("nonsense", "makes no sense"),
    ],
)
def test_what_goes_wrong_is_a_verdict_with_its_reason(
    tmp_path: Path, mode: str, words: str
) -> None:
    verdict = _probe(tmp_path, mode)
    assert not verdict.works and verdict.rates is None
    assert verdict.reason.startswith("the probe of CUDA IPC failed: ")
    assert words in verdict.reason


@pytest.mark.parametrize("mode", ["hang", "silent", "flood"])
def test_what_does_not_answer_is_ended_in_time(tmp_path: Path, mode: str) -> None:
    begun = time.monotonic()
    timeout = 2.0 if mode == "hang" else 1.0  # it hangs only once it runs
    verdict = _probe(tmp_path, mode, timeout=timeout)
    assert not verdict.works and "no answer in time" in verdict.reason
    assert time.monotonic() - begun < timeout + 5


def test_every_line_of_a_process_runs_on_a_cuda_of_host_memory(tmp_path: Path) -> None:
    """But those of the kernels, which NVRTC compiles (`test_the_kernels_compile`)."""
    build_libcuda(tmp_path)
    verdict = _probe(tmp_path, "cuda", timeout=60)
    assert verdict.works, verdict.reason
    rate = (1 << 16) / 1e-3 / 1e6
    assert verdict.rates == Rates(rate, rate, rate)


def test_a_gpu_that_is_another_one_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ipc_probe_child, "_die_with_parent", lambda: None)
    with FakeCuda(build_libcuda(tmp_path)).installed() as fake:
        fake.runtime.deviceGetPCIBusId = lambda index: "0000:01:00.0"  # type: ignore[attr-defined]
        assert ipc_probe_child.main(0, "0000:02:00.0") == 1
    answer = json.loads(capsys.readouterr().out.removeprefix(ANSWER_MARK))
    assert answer == {"error": "RuntimeError: number 0 is another GPU here, 0000:01:00.0"}
    assert "--gpus-per-node" in ipc_probe._hint(answer["error"])


def test_a_program_that_is_not_there() -> None:
    verdict = probe(TWO, command=["/no/such/program"])
    assert not verdict.works and "cannot be started" in verdict.reason


def test_one_process_per_gpu_and_two_on_one_that_is_shared() -> None:
    a, b = TWO
    assert ipc_probe._devices_of_children([a]) == [a, a]
    assert ipc_probe._devices_of_children([a, b]) == [a, b]
    assert ipc_probe._devices_of_children([a, a]) == [a, a]
    # Ranks that see one GPU each may give it the same number.
    other = ProbeDevice(0, "0000:02:00.0", "1")
    assert ipc_probe._devices_of_children([a, other, a]) == [a, other, a]
    # Slices of a card do not see each other's memory, whatever one of them may alone.
    slices = [ProbeDevice(0, a.bus_id, f"MIG-{uuid}") for uuid in ("3f", "4e")]
    assert ipc_probe._devices_of_children(slices) == slices


def test_as_a_program_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpi_dasgd.device.ipc_probe", "--timeout", "50"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={"PATH": "/usr/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 3 and last.startswith("IPC fails: the probe of CUDA IPC failed: ")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("failure", "hint"),
    [
        ("start: DeviceFailed: all CUDA-capable devices are busy or unavailable", "nvidia-smi -c"),
        ("start: AcceleratorError: CUDA error: invalid device ordinal", "--gpus-per-node"),
        ("use: opening another rank's region (cudaIpcOpenMemHandle) failed", "--ipc=host"),
        ("start: No module named 'cupy'", "pip install cupy"),
        ("check: no answer in time", ""),
    ],
)
def test_known_failures_have_a_remedy(failure: str, hint: str) -> None:
    said = ipc_probe._hint(failure)
    assert hint in said and bool(hint) == bool(said)


@pytest.mark.slow
def test_the_kernels_compile() -> None:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    source = ipc_probe_child._SOURCE.encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"probe.cu", 0, None, None)
    options = (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_80")
    assert nvrtc.nvrtcCompileProgram(program, 1, options) == 0
