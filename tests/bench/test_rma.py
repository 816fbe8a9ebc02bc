"""`bench rma`: its report follows from its raw samples, and wrong payloads are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd import bench
from mpi_dasgd.bench import rma
from mpi_dasgd.bench.sample_store import quartiles, read_samples, samples_path, write_samples
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


def test_the_report_follows_from_the_raw_samples(mpi: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "1Kb"], "'1Kb' is not a size"),
        (["--sizes", "66"], "multiple of 4"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--ranks", "1"], "--ranks must be at least 2"),
    ],
)
def test_wrong_rma_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.run("rma", arguments)


def test_sizes_beyond_the_memory_are_refused() -> None:
    with pytest.raises(UserError, match="give smaller --sizes"):
        rma._require_memory(2, 10**15)


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(UserError, match="'rna' is not known; did you mean 'rma'"):
        bench.run("rna", [])


def test_samples_are_read_back_unchanged(tmp_path: Path) -> None:
    path = samples_path("some", tmp_path / "deep" / "folder")
    columns = {"op": ["put", "get"], "bytes": [1, 2**40], "seconds": [1e-9, 2.5]}
    write_samples(path, "some", columns, {"ranks": 2})
    stored, attributes = read_samples(path)
    assert {name: list(values) for name, values in stored.items()} == columns
    assert attributes["ranks"] == 2 and attributes["bench"] == "some"
    with pytest.raises(ValueError, match="differ in length"):
        write_samples(path, "some", {"a": [1], "b": [1, 2]})


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        samples_path("some", tmp_path / "file" / "folder")


def test_quartiles_are_those_of_unsorted_samples() -> None:
    assert quartiles([5, 1, 2, 4, 3]) == (2, 3, 4)
