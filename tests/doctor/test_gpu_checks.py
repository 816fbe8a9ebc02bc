"""What the doctor says of GPUs, with cards that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpi_dasgd.device import gpu_facts, ipc_probe
from mpi_dasgd.device.gpu_facts import GpuFacts
from mpi_dasgd.device.ipc_probe import Rates, Verdict
from mpi_dasgd.doctor import gpu_checks
from mpi_dasgd.doctor.check import OK, WARNING


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GpuFacts]:
    """Two cards, which may be changed."""
    cards = [
        GpuFacts(i, "NVIDIA H100", f"0000:{bus}:00.0", (9, 0), "14.2.0", "13.0")
        for i, bus in enumerate(("3B", "5E"))
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(gpu_facts, "read_gpu", lambda index: cards[index])
    monkeypatch.setattr(ipc_probe, "probe", lambda *_: Verdict(True, "fast", Rates(400, 390, 1500)))
    monkeypatch.setattr(gpu_checks, "_DRIVER", tmp_path)
    for name in ("0000:3b:00.0", "0000:5e:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build"
    (tmp_path / "version").write_text(f"{version}\nGCC version: 12.2\n")
    return cards


@pytest.mark.usefixtures("cards")
def test_cards_that_read_each_other() -> None:
    (check,) = gpu_checks.checks()
    assert check.verdict == OK
    assert check.text == (
        "CuPy 14.2.0, driver 580.159.04 (CUDA 13.0), capability 9.0, CUDA_VISIBLE_DEVICES=0,1; "
        "CUDA IPC works: fast"
    )
    assert check.values["ipc"] is True and check.values["read_gb_per_s"] == 400
    assert check.values["hidden"] == 0


def test_hidden_cards_are_named(cards: list[GpuFacts]) -> None:
    del cards[1]
    (check,) = gpu_checks.checks()
    assert check.verdict == WARNING and check.values["hidden"] == 1
    assert "1 more GPUs of this machine are hidden" in check.text
    assert "--gpus-per-node" in check.text


@pytest.mark.usefixtures("cards")
def test_ipc_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc_probe, "probe", lambda *_: Verdict(False, "killed by SIGSEGV"))
    (check,) = gpu_checks.checks()
    assert check.verdict == WARNING and check.values["ipc"] is False
    assert check.text.endswith("copied to the host and exchanged there: killed by SIGSEGV")


def test_without_cupy_nothing_is_probed(
    cards: list[GpuFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards[:] = [GpuFacts(0, "NVIDIA H100", capability=(9, 0), problem="CuPy is not installed")]
    monkeypatch.delattr(ipc_probe, "probe")
    (check,) = gpu_checks.checks()
    assert check.verdict == WARNING and check.values["ipc"] is None
    assert check.text.startswith("CuPy missing, driver 580.159.04 (CUDA unknown)")
    assert check.text.endswith("exchanged there: CuPy is not installed")


def test_without_a_card_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_checks.checks() == []
