"""What is known of a GPU, and what keeps models from being exchanged on it, in words."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpi_dasgd.device.gpu_facts import MIN_CAPABILITY, GpuFacts, read_gpu
from mpi_dasgd.device.ipc_probe import ProbeDevice
from mpi_dasgd.kernels.cuda import program


def _cupy(version: str, error: Exception | None = None) -> Any:
    def bus_id(index: int) -> str:
        if error is not None:
            raise error
        return f"0000:0{index}:00.0"

    runtime = SimpleNamespace(deviceGetPCIBusId=bus_id, driverGetVersion=lambda: 13010)
    return SimpleNamespace(__version__=version, cuda=SimpleNamespace(runtime=runtime))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that torch sees, and CuPy."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setitem(sys.modules, "cupy", _cupy("14.2.0"))


@pytest.mark.usefixtures("card")
def test_a_card_that_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    gpu = read_gpu(1)
    assert gpu == GpuFacts(1, "NVIDIA H100", "0000:01:00.0", (9, 0), "14.2.0", "13.1", "")
    assert gpu.probed == ProbeDevice(1, "0000:01:00.0", "2,3")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("cupy", "words"),
    [
        (None, "CuPy is not installed: `pip install cupy-cuda13x`"),
        (_cupy("13.6.0"), "CuPy 14 or newer is needed, and this is 13.6.0"),
        (
            _cupy("14.2.0", RuntimeError("cudaErrorInsufficientDriver: too old\nmore")),
            "CuPy 14.2.0 cannot use cuda:0 (cudaErrorInsufficientDriver: too old)",
        ),
    ],
)
def test_cupy_that_is_missing_old_or_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, cupy: Any, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # None: its import fails
    assert read_gpu(0).problem.startswith(words)


@pytest.mark.usefixtures("card")
def test_a_card_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert "need compute capability 8.0 (A100) or newer, and NVIDIA H100" in read_gpu(0).problem


def test_no_card() -> None:
    if not torch.cuda.is_available():
        assert read_gpu(0).problem.startswith("torch cannot use cuda:0 (")


def test_the_least_capability_is_that_of_the_kernels() -> None:
    assert MIN_CAPABILITY == program.MIN_CAPABILITY
