"""Fused pair averaging: same bits natively and in NumPy; both sides move by the same amounts."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mpi_dasgd.kernels import native
from mpi_dasgd.kernels.pair_average import pair_average, pair_average_numpy

needs_native = pytest.mark.skipif(native.load() is None, reason=native.status())


def _models(count: int, size: int, dtype: type, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-6, 6, size)
    return [(rng.normal(size=size) * scales).astype(dtype) for _ in range(count)]


@needs_native
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 3, 1023, 1024, 1025, 40_000, 1_100_000])
@pytest.mark.parametrize("n_deltas", [0, 1, 3])
@pytest.mark.parametrize("partner", [False, True])
def test_native_library_and_numpy_agree_bit_for_bit(
    dtype: type, size: int, n_deltas: int, partner: bool
) -> None:
    x, partner_model, *deltas = _models(2 + n_deltas, size, dtype)
    if size > 3:
        x[0], partner_model[1], x[2] = np.inf, np.nan, 1e-40  # values of a diverging run
    results = []
    for run in (pair_average, pair_average_numpy):
        mine, reply_delta, publication = x.copy(), np.zeros_like(x), np.zeros_like(x)
        with np.errstate(all="ignore"):
            run(
                mine,
                deltas,
                partner_model if partner else None,
                0.5,
                reply_delta if partner else None,
                publication,
            )
        results.append((mine.tobytes(), reply_delta.tobytes(), publication.tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("run", [pair_average, pair_average_numpy])
def test_results_follow_the_formulas(run: object) -> None:
    x, partner_model, one, two = _models(4, 5000, np.float64)
    mine, reply_delta, publication = x.copy(), np.empty_like(x), np.empty_like(x)
    run(mine, [one, two], partner_model, 0.25, reply_delta, publication)  # type: ignore[operator]
    absorbed = x + one + two
    np.testing.assert_array_equal(reply_delta, -(0.25 * (partner_model - absorbed)))
    np.testing.assert_array_equal(mine, absorbed - reply_delta)
    np.testing.assert_array_equal(publication, mine)


@pytest.mark.parametrize("run", [pair_average, pair_average_numpy])
def test_outputs_are_optional(run: object) -> None:
    x, partner_model = _models(2, 2000, np.float32)
    mine = x.copy()
    run(mine)  # type: ignore[operator]
    np.testing.assert_array_equal(mine, x)
    run(mine, (), partner_model)  # type: ignore[operator]
    np.testing.assert_array_equal(mine, x + np.float32(0.5) * (partner_model - x))


def test_an_exchange_conserves_the_sum_exactly_where_addition_is_exact() -> None:
    rng = np.random.default_rng(1)
    mine, partner = (rng.integers(-1000, 1000, 4096).astype(np.float32) for _ in range(2))
    total = mine + partner
    reply_delta = np.empty_like(mine)
    pair_average(mine, (), partner, 0.5, reply_delta)
    pair_average(partner, [reply_delta])
    np.testing.assert_array_equal(mine + partner, total)
    np.testing.assert_array_equal(mine, partner)


WITHOUT_THREADS = """
import resource
import numpy as np
from mpi_dasgd.kernels.pair_average import pair_average
x, other = np.arange(1 << 18, dtype=np.float32), np.zeros(1 << 18, np.float32)
expected = x / 2
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20),) * 2)  # less than a stack
pair_average(x, partner_model=other, threads=4)
assert (x == expected).all()
"""


@needs_native
def test_threads_that_cannot_be_started_are_not_needed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
