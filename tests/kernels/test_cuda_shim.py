"""The CUDA kernels, run on the CPU (``cuda_shim.h``), give the same bits as the reference.

This covers the whole GPU backend except CuPy and the device, including the Python that describes a
step to the kernels. Run as a program, ``test_cuda_shim.py LIBRARY`` does a part of the comparison
with that library, under the sanitizers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import cuda, reference
from mpi_dasgd.kernels.encoded import BITS, EncodedVector, FusedStep
from tests.support.cuda_build import build
from tests.support.fake_cupy import DeviceArray, FakeCupy, install
from tests.support.lattice_cases import Case, cases, outcomes
from tests.support.mpi_ranks import ROOT

pytestmark = pytest.mark.slow

SHAPES = ((1, 32), (2, 96), (64, 256))
"""Grid and block sizes of the launches, instead of those for a real device."""


def compare(case: Case, expected: dict[str, bytes]) -> None:
    """Assert that the kernels give the results of the reference."""
    results = outcomes(case, cuda.run, lambda array: array.copy().view(DeviceArray))
    assert list(results) == list(expected)
    assert not [name for name in results if results[name] != expected[name]], case


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "lattice.so"
    build(library)
    return library


@pytest.fixture
def fake(library: Path) -> Iterator[FakeCupy]:
    before = sys.modules.get("cupy")
    fake = FakeCupy(library)
    install(fake)
    yield fake
    del sys.modules["cupy"]
    if before is not None:
        sys.modules["cupy"] = before
    cuda._kernel.cache_clear()
    cuda._module.cache_clear()


@pytest.mark.parametrize("nearest", [False, True], ids=["dither", "nearest"])
@pytest.mark.parametrize("bits", BITS)
def test_same_bits_as_the_reference(fake: FakeCupy, bits: int, nearest: bool) -> None:
    for i, case in enumerate(cases(bits, nearest)):
        fake.shape = SHAPES[i % len(SHAPES)]
        compare(case, outcomes(case, reference.run))
    names = ("encode", "sgd_encode", "apply", "exchange", "merge", "merge_forward", "fused")
    assert {f"mpd_{name}_{bits}" for name in names} <= set(fake.launched)


def test_results_do_not_depend_on_the_grid(fake: FakeCupy) -> None:
    *_, case, _ = cases(8, False)
    expected = outcomes(case, reference.run)
    for fake.shape in (None, *SHAPES):
        compare(case, expected)


def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    library = tmp_path / "lattice.so"
    sanitizers = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    build(library, *sanitizers, "-O0", "-g")  # -O2 takes longer to compile than it saves
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {
        **os.environ,
        "LD_PRELOAD": runtime,  # before Python's allocations, so that NumPy's are checked as well
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"
        ":allocator_may_return_null=1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(library)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runtime error" not in done.stderr, done.stderr
    assert done.stdout.strip() == "same bits"


def test_arrays_that_are_not_aligned_are_refused(fake: FakeCupy) -> None:
    def on_device(dtype: Any, size: int, offset: int = 0) -> Any:
        return np.zeros(size + offset, dtype).view(DeviceArray)[offset:]

    encoded = EncodedVector(1024, 8, on_device("u1", 1024), on_device("f4", 1), on_device("u4", 1))
    step = FusedStep(on_device("f4", 1024, offset=1))
    step.publication = encoded
    with pytest.raises(UserError, match="x: expected memory aligned to 16 bytes, got .* 4 bytes"):
        cuda.run(step)
    step = FusedStep(on_device("f4", 1024))
    step.publication = EncodedVector(
        1024, 8, on_device("u1", 1024, offset=2), encoded.scales, encoded.checksums
    )
    with pytest.raises(
        UserError, match="codes: expected memory aligned to 4 bytes, got .* 2 bytes"
    ):
        cuda.run(step)
    assert not fake.launched


if __name__ == "__main__":
    install(FakeCupy(Path(sys.argv[1])))
    for bits in BITS:
        for case in cases(bits, nearest=bits == 8, sizes=(1, 1023, 1025)):
            compare(case, outcomes(case, reference.run))
    print("same bits")
