"""The script for a machine with a GPU: no step stops the others, and each leaves a line.

A stand-in for the interpreter plays the steps; what they run has tests of its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT

PYTHON = """#!/bin/bash
case "$*" in
  *ipc_probe*) echo "IPC ok, read 700 GB/s" ;;
  *"gpu order"*) echo "ORDER fails"; exit 3 ;;
  *"--model gpt2"*) kill -SEGV $$ ;;
  *"--model resnet50"*) echo "OVERHEAD resnet50 0.7 %" ;;
  *"transport.memory=host"*) sleep 100 ;;
esac
exit 0
"""


def _check(tmp_path: Path, seconds: int, limits: str = "") -> tuple[int, dict[str, str], Path]:
    """Run the script; return its exit code, its table by step, and its folder."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    script = (ROOT / "jobs" / "gpu_check.sh").read_text()
    if limits:
        script = script.replace(*limits.split("|"))
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "gpu_check.sh").write_text(script)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(folder / "gpu_check.sh"), str(out), str(seconds)],
        env={**os.environ, "PYTHON": str(tmp_path / "python")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = (out / "table.txt").read_text().splitlines()
    return done.returncode, dict(line.split(":", 1) for line in lines if ":" in line), out


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("check")
    return _check(folder, 330, "step B4-host-2 45|step B4-host-2 1")


def test_every_step_leaves_a_line_and_stops_no_other(checked) -> None:
    _, table, _ = checked
    assert list(table)[:4] == ["A1-bits", "B0-ipc", "B1-order", "B2-ipc-2"]
    assert len(table) == 15
    assert table["B0-ipc"].startswith(" exit 0")
    assert table["B0-ipc"].endswith("IPC ok, read 700 GB/s")
    assert "OVERHEAD resnet50 0.7 %" in table["D1-resnet50"]


def test_failures_crashes_and_hangs_are_told(checked) -> None:
    code, table, _ = checked
    assert code == 1
    assert " exit 3" in table["B1-order"]
    assert " exit 139" in table["D2-gpt2"]
    assert "over its limit of 1 s" in table["B4-host-2"]
    assert " exit 0" in table["B3-ipc-4"]


def test_few_files_come_back(checked) -> None:
    _, _, out = checked
    assert sorted(p.name for p in out.iterdir()) == ["machine.txt", "results.tgz", "table.txt"]


def test_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    code, table, _ = _check(tmp_path, 1)
    assert code == 0
    assert len(table) == 15
    assert all("skipped" in line for line in table.values())
