"""`bench rma`: its report follows from its raw samples, and wrong payloads are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd.bench import rma
from mpi_dasgd.bench.sample_store import read_samples
from mpi_dasgd.errors import UserError
from tests.support.mpi_ranks import ROOT, mpi_library, run_ranks

IN_PLACE = {"publish", "read", "put", "average", "exchange"}
REMOTE = {"publish", "get", "put"}


def measure(mpi: str, directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mpi_dasgd", "bench", "rma", "--seconds", "0.01", *arguments],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MPI4PY_LIBMPI": str(mpi_library(mpi)),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_medians_and_ratios_follow_from_the_raw_samples(mpi: str, tmp_path: Path) -> None:
    text = measure(mpi, tmp_path, "--sizes", "4KiB", "1MB", "--json", "--out", "raw")
    report = json.loads(text)
    rows = report["rows"]
    for size in (4096, 1_000_000):
        measured = [(row["path"], row["op"]) for row in rows if row["bytes"] == size]
        expected = {("in place", op) for op in IN_PLACE} | {("remote", op) for op in REMOTE}
        assert set(measured) == expected | {("private", "memcpy")}
        # memcpy is measured with each of both paths.
        assert len(measured) == len(expected) + 2
    columns, attributes = read_samples(tmp_path / report["samples"])
    assert attributes["bench"] == "rma" and attributes["ranks"] == 2
    assert "numpy" in attributes and "cpu_model" in attributes
    for row in rows:
        if row["op"] == "memcpy":
            continue
        selected = (columns["bytes"] == row["bytes"]) & (columns["path"] == row["path"])
        selected &= columns["warm_up"] == 0
        seconds = columns["seconds"][selected & (columns["op"] == row["op"])]
        memcpy = np.median(columns["seconds"][selected & (columns["op"] == "memcpy")])
        median = np.median(seconds)
        assert seconds.size == row["samples"] >= 7
        assert row["median_us"] == pytest.approx(median * 1e6)
        assert row["q1_us"] <= row["median_us"] <= row["q3_us"]
        assert row["mb_per_s"] == pytest.approx(row["bytes"] / median / 1e6)
        assert row["ratio_to_memcpy"] == pytest.approx(memcpy / median)


@pytest.mark.mpi
def test_the_table_ends_with_the_path_of_the_samples(tmp_path: Path) -> None:
    lines = measure("mpich", tmp_path, "--sizes", "1KiB").splitlines()
    assert lines[0].startswith("MPICH")
    assert lines[1].split()[:3] == ["op", "path", "bytes"]
    (samples,) = (tmp_path / "bench-results").iterdir()
    assert lines[-1] == f"raw samples: bench-results/{samples.name}"


@pytest.mark.mpi
def test_a_wrong_payload_is_found(tmp_path: Path) -> None:
    program = f"""
    import sys
    from mpi_dasgd.codecs.none import NoCodec
    encode = NoCodec.encode
    def wrong(self, x, out):
        encode(self, x, out)
        out.payload[-1] += 1
    NoCodec.encode = wrong
    from mpi_dasgd.cli import main
    options = ["--sizes", "4KiB", "--seconds", "0.01", "--out", {str(tmp_path)!r}]
    sys.exit(main(["bench", "rma", *options]))
    """
    done = run_ranks(2, program, check=False)
    assert done.code == 1
    assert "arrived other than they were sent" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sizes_beyond_the_memory_are_refused() -> None:
    with pytest.raises(UserError, match="give smaller --sizes"):
        rma._require_memory(2, 10**15)
