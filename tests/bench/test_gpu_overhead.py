"""`bench gpu overhead`: its report follows from its samples, and its Python runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpi_dasgd.bench.gpu_models import build_gpu_model
from mpi_dasgd.bench.gpu_overhead import Block, summarize
from mpi_dasgd.bench.sample_store import read_samples
from mpi_dasgd.errors import UserError
from tests.support.mpi_ranks import ROOT, missing, mpi_library

LATE = "tests.programs.late_overhead"


def _block(number: int, every: int, seconds: float, **values: float) -> Block:
    made = 20 // every if every else 0
    fields = {"exchanges": made, "host_seconds": 2e-4 * made, "catch_up_seconds": 0.0}
    return Block(number, every, 20, seconds=seconds, **{**fields, **values})  # type: ignore[arg-type]


def test_shares_compare_with_the_plain_block_of_the_same_round() -> None:
    # The machine is half as fast in the second round.
    blocks = [_block(0, 0, 1.0), _block(0, 1, 1.02), _block(0, 4, 1.005)]
    blocks += [_block(1, 4, 2.01), _block(1, 0, 2.0), _block(1, 1, 2.04)]
    blocks += [_block(2, 0, 1.0), _block(2, 4, 1.005), _block(2, 1, 1.04, exchanges=10)]
    summary = summarize(blocks)
    assert summary["rounds"] == 3 and summary["plain_ms"] == pytest.approx(50.0)
    assert summary["H1_share"] == pytest.approx(2.0) and summary["H4_share"] == pytest.approx(0.5)
    assert summary["H1_share_q3"] == pytest.approx(3.0)
    assert summary["H1_extra_ms"] == pytest.approx(2.0)
    assert summary["H4_extra_ms"] == pytest.approx(0.25)
    assert summary["H1_made"] == pytest.approx(50 / 60) and summary["H4_made"] == 1.0
    assert summary["host_us"] == pytest.approx(200.0)
    assert summary["host_us_q3"] == pytest.approx(300.0), "of the exchanges that were made"


@pytest.mark.parametrize("name", ["resnet50", "gpt2"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"resnet50": "torchvision", "gpt2": "transformers"}[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--model {name} needs the package '{package}'"):
        build_gpu_model(name, "cpu")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("program", "memory"), [("mpi_dasgd bench gpu overhead", "host"), (LATE, "ipc")]
)
def test_a_tiny_model_on_the_cpu(tmp_path: Path, program: str, memory: str) -> None:
    """In a process of its own, which starts MPI; on the host, and on a device that is late."""
    library = mpi_library("mpich")
    if library is None:
        missing("no library of MPICH: `make test` installs it")
    arguments = f"-m {program} --model tiny --device cpu --steps 4 --rounds 2 --json"
    done = subprocess.run(
        [sys.executable, *arguments.split(), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            **os.environ,
            "MPI4PY_LIBMPI": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["H1_made"] == report["H4_made"] == 1.0, "it always finds itself"
    assert (report["parameters"], report["memory"], report["rounds"]) == (12426, memory, 2)
    columns, attributes = read_samples(report["samples"])
    assert attributes["device"] == "cpu" and attributes["model"] == "tiny"
    blocks = [
        Block(**{name: column[row] for name, column in columns.items()})
        for row in range(len(columns["round"]))
    ]
    assert sorted((b.round, b.every, b.exchanges) for b in blocks) == [
        (number, every, made) for number in (0, 1) for every, made in ((0, 0), (1, 4), (4, 1))
    ]
    assert summarize(blocks)["H1_share"] == pytest.approx(report["H1_share"])
