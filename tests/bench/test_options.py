"""Options of all benchmarks: wrong ones are refused with a message."""

from __future__ import annotations

import pytest

from mpi_dasgd import bench
from mpi_dasgd.bench.options import parse_quantity, validate_names
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native

needs_native = pytest.mark.skipif(native.load() is None, reason=native.status())


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        *(
            pytest.param("kernel", arguments, message, marks=needs_native)
            for arguments, message in (
                ("--sizes 64KB", "'64KB' is not a number of elements"),
                ("--sizes 0", "'0' is not a number of elements"),
                ("--threads 0", "--threads must be at least 1"),
                ("--rounds 0", "--rounds must be at least 1"),
                ("--ops exchang", "'exchang' is not known; did you mean 'exchange'"),
                ("--backends AVX", "'AVX' is not known"),
                ("--sizes 1000000M", "give smaller --sizes"),
            )
        ),
        ("quality", "--buckets 0", "--buckets must be at least 1, got 0"),
        ("quality", "--messages 1", "--messages must be at least 2, got 1"),
        ("quality", "--rounds 1", "--rounds must be at least 2, got 1"),
        ("quality", "--seed -1", "--seed must be at least 0"),
        ("quality", "--parts error", "--parts: 'error' is not known; did you mean 'errors'"),
        ("quality", "--laws cauchy", "--laws: 'cauchy' is not known.*'gauss', 't3'"),
        ("rma", "--sizes 1Kb", "'1Kb' is not a size"),
        ("rma", "--sizes 66", "multiple of 4"),
        ("rma", "--seconds 0", "--seconds must be positive"),
        ("rma", "--ranks 1", "--ranks must be at least 2"),
        ("rna", "", "'rna' is not known; did you mean 'rma'"),
    ],
)
def test_wrong_options_are_refused(benchmark: str, arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.run(benchmark, arguments.split())


def test_names_are_valid_or_the_nearest_one_is_named() -> None:
    validate_names("bench some: --names", ["one", "two"], ["one", "two", "three"])
    with pytest.raises(UserError) as raised:
        validate_names("bench some: --names", ["one", "tree"], ["one", "two", "three"])
    assert str(raised.value) == (
        "bench some: --names: 'tree' is not known; did you mean 'three'? (valid: one, two, three)"
    )


def test_quantities_have_a_known_unit_or_none() -> None:
    units = {"": 1, "KiB": 1024}
    assert [parse_quantity(text, units) for text in ("12", "4KiB", "4 KiB")] == [12, 4096, 4096]
    assert [parse_quantity(text, units) for text in ("", "KiB", "4kib", "-4", "4.5")] == [0] * 5
