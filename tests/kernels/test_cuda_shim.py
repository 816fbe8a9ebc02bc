"""The CUDA kernels, run on the CPU (``cuda_shim.h``), give the same bits as the reference.

This covers the whole GPU backend except CuPy and the device, including the Python that describes a
step to the kernels. Run as a program, ``test_cuda_shim.py LIBRARY`` does a part of the comparison
with that library, under the sanitizers.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import cuda, reference
from mpi_dasgd.kernels.encoded import BITS, BUCKET_STATS, EncodedVector, FusedStep
from tests.support.average_cases import FORMATS, average_cases, expected_average, found_average
from tests.support.cuda_build import build, shared_library
from tests.support.fake_cupy import DeviceArray, FakeCupy, install
from tests.support.lattice_cases import Case, cases, outcomes
from tests.support.mpi_ranks import ROOT
from tests.support.scale_cases import compare_scales

pytestmark = pytest.mark.slow

SHAPES = ((1, 32), (2, 96), (64, 256))
"""Grid and block sizes of the launches, instead of those for a real device."""


def compare(case: Case, expected: dict[str, bytes]) -> None:
    """Assert that the kernels give the results of the reference."""
    results = outcomes(case, cuda.run, lambda array: array.copy().view(DeviceArray))
    assert list(results) == list(expected)
    assert not [name for name in results if results[name] != expected[name]], case


@pytest.mark.parametrize("nearest", [False, True], ids=["dither", "nearest"])
@pytest.mark.parametrize("bits", BITS)
def test_same_bits_as_the_reference(fake: FakeCupy, bits: int, nearest: bool) -> None:
    for i, case in enumerate(cases(bits, nearest)):
        fake.shape = SHAPES[i % len(SHAPES)]
        compare(case, outcomes(case, reference.run))
    names = ("encode", "apply", "exchange", "merge", "merge_forward", "fused")
    names += ("fused_sgd", "fused_adam")
    expected = {f"mpd_{name}_{bits}" for name in names} | {"mpd_sgd", "mpd_adam"}
    assert expected <= set(fake.launched)


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


def test_a_word_that_is_written_meanwhile_does_not_part_the_lanes() -> None:
    """Else some of them wait for the others for ever. In a process of its own, which may abort."""
    done = subprocess.run(
        [sys.executable, __file__, str(shared_library()), "torn"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": rejected") == 6


def _tear(fake: FakeCupy, operation: str, part: str) -> None:
    """Do an operation while a word of its message changes between the loads of the lanes."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(1024, np.float32).view(DeviceArray)
    message, delta = (EncodedVector.empty(1024, 8, seed, xp=fake) for seed in (1, 2))
    message.scales[:] = 1e-2
    lattice_step = FusedStep(x)
    lattice_step.publication = message
    cuda.run(lattice_step)
    exchange = FusedStep(x.copy())
    exchange.partner_model, exchange.reply_delta = message, delta
    cuda.run(exchange)
    y = x + np.float32(0.1)
    step, before = FusedStep(y), y.copy()
    step.stats = fake.zeros(1, BUCKET_STATS)
    if operation == "apply":
        step.deltas, step.delta_stats, torn = (delta,), (step.stats,), delta
    else:
        step.partner_model, step.merge, torn = message, int(operation == "merge"), message
    fake.library.mpd_tear(ctypes.c_void_p(getattr(torn, part).data.ptr))
    cuda.run(step)
    fake.library.mpd_tear(None)
    assert step.stats["rejected"][0] == 1
    assert np.array_equal(y, before)
    print(f"{operation}, {part}: rejected", flush=True)


if __name__ == "__main__":
    fake_cupy = FakeCupy(Path(sys.argv[1]))
    install(fake_cupy)
    if sys.argv[2:]:
        for operation in ("apply", "exchange", "merge"):
            for part in ("checksums", "scales"):
                _tear(fake_cupy, operation, part)
        sys.exit()
    for bits in BITS:
        for case in cases(bits, nearest=bits == 8, sizes=(1, 1023, 1025)):
            compare(case, outcomes(case, reference.run))
    for _, in_numpy, in_shim in compare_scales(8, 8, fake_cupy.asarray, np.asarray):
        assert in_numpy == in_shim
    for codec in FORMATS:
        for average in average_cases(codec):
            if average.x.size < 5000:
                found = found_average(average, fake_cupy.asarray, np.asarray)[0]
                for name, value in expected_average(average)[0].items():
                    np.testing.assert_array_equal(value, found[name], str(average))
    print("same bits")
