"""Whether a vector is finite: natively and in NumPy, at each place of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpi_dasgd.kernels import finite, native
from mpi_dasgd.kernels.finite import all_finite_numpy, prepare_all_finite

needs_native = pytest.mark.skipif(native.load() is None, reason=native.status())

WAYS = [
    pytest.param(prepare_all_finite, id="native", marks=needs_native),
    pytest.param(lambda x: lambda: all_finite_numpy(x), id="numpy"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("prepare", WAYS)
def test_one_element_that_is_not_finite_is_found_wherever_it_is(
    prepare: Callable[[np.ndarray], Callable[[], bool]], dtype: type
) -> None:
    info = np.finfo(dtype)
    for size in (0, 1, 3, 64, 1025):
        x = np.resize([info.max, info.min, info.tiny / 2, -0.0, 1.0], size).astype(dtype)
        is_finite = prepare(x)
        assert is_finite()  # the sum of the squares is not
        for position in {0, size // 2, size - 1} if size else ():
            for value in (np.inf, -np.inf, np.nan, -np.nan):
                before, x[position] = x[position], value
                assert not is_finite()
                x[position] = before
        assert is_finite()


@needs_native
def test_signalling_nans_are_found_as_well() -> None:
    x = np.ones(100, np.float32)
    x.view(np.uint32)[7] = 0xFF800001
    assert not prepare_all_finite(x)()


@pytest.mark.parametrize("library", [None, object()])
def test_without_the_native_function_numpy_answers(
    monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    """As after a pull without a build."""
    monkeypatch.setattr(native, "load", lambda: library)
    assert prepare_all_finite(np.ones(3))() and not prepare_all_finite(np.array([np.nan]))()


def test_a_large_vector_is_left_to_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_LARGE", 10)
    monkeypatch.setattr(finite, "all_finite_numpy", lambda x: "by NumPy")
    assert prepare_all_finite(np.ones(11))() == "by NumPy"
