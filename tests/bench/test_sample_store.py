"""Raw samples of benchmarks: files, columns and quartiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpi_dasgd.bench.sample_store import (
    columns_of,
    quartiles,
    read_samples,
    samples_path,
    write_samples,
)
from mpi_dasgd.errors import UserError


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


def test_columns_keep_the_order_of_rows_and_keys() -> None:
    columns = columns_of([{"op": "put", "bytes": 1}, {"op": "get", "bytes": 2}])
    assert list(columns.items()) == [("op", ["put", "get"]), ("bytes", [1, 2])]


def test_quartiles_are_those_of_unsorted_samples() -> None:
    assert quartiles([5, 1, 2, 4, 3]) == (2, 3, 4)
