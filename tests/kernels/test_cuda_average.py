"""Pair averages of unquantized, bf16 and fp16 models on a GPU, with the kernels in the shim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.cuda.pair_average import pair_average
from tests.support.average_cases import FORMATS, average_cases, expected_average, found_average
from tests.support.fake_cupy import FakeCupy, forget

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("codec", FORMATS)
def test_bits_are_those_of_the_host(fake: FakeCupy, codec: str) -> None:
    for number, case in enumerate(average_cases(codec)):
        fake.properties["multiProcessorCount"] = number % 3 + 1
        (expected, distance), (found, square) = (
            expected_average(case),
            found_average(case, fake.asarray, np.asarray),
        )
        forget()  # so that the next launch asks how many multiprocessors there are
        assert list(expected) == list(found)
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name], f"{case}: {name}")
        if case.x.size == 0 or case.partner_model is None:
            assert square in (0, -1), case
        elif np.isfinite(distance):
            assert square**0.5 == pytest.approx(distance, rel=1e-4), case


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (np.zeros(5000), "expected float32, uint16 .bf16. or float16, got float64"),
        (np.zeros(4999, "f4"), r"expected float32 of shape .5000,., .*, got float32 of shape"),
        (np.zeros(5001, "f4")[1:], "expected memory aligned to 16 bytes, got an address .* 4"),
        (np.zeros(5001, "f2")[1:], "expected memory aligned to 8 bytes, got an address .* 2"),
    ],
)
def test_payloads_that_do_not_fit_are_refused(
    fake: FakeCupy, payload: np.ndarray, message: str
) -> None:
    x: Any = fake.zeros(5000, np.float32)
    offset = int(payload.base is not None)
    given = fake.zeros(payload.size + offset, payload.dtype)[offset:]
    with pytest.raises(UserError, match=message):
        pair_average(x, (), given)
    with pytest.raises(UserError, match="x: expected memory aligned to 16 bytes"):
        pair_average(fake.zeros(5001, np.float32)[1:], (), fake.zeros(5000, np.float32))
    assert not fake.launched
