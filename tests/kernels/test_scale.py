"""The scale of the lattice codec on a GPU: the bits of the host's, with the kernels in the shim."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.cuda.scale import BucketScales
from mpi_dasgd.kernels.encoded import BITS, BUCKET
from tests.support.fake_cupy import FakeCupy
from tests.support.scale_cases import compare_scales

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bits", BITS)
def test_estimates_and_scales_are_those_of_the_host(fake: FakeCupy, bits: int) -> None:
    for elements, rounds in ((300 * BUCKET - 37, 25), (15 * BUCKET, 60)):
        for name, expected, found in compare_scales(
            bits, rounds, fake.asarray, np.asarray, elements
        ):
            assert expected == found, (elements, name)
    assert {"mpd_measure", "mpd_guess_estimates", "mpd_next_scales", "mpd_learn", "mpd_total"} == {
        *fake.launched
    }


def test_a_model_that_is_not_aligned_is_refused(fake: FakeCupy) -> None:
    x = fake.zeros(BUCKET + 1, np.float32)[1:]
    with pytest.raises(UserError, match="x: expected memory aligned to 16 bytes"):
        BucketScales(1, 0.02, 0.9, True).measure(x)
    assert not fake.launched


def test_a_model_without_elements_is_left_alone(fake: FakeCupy) -> None:
    scales = BucketScales(0, 0.02, 0.9, True)
    scales.measure(fake.zeros(0, np.float32))
    scales.next_scales(fake.zeros(0, np.float32))
    assert not fake.launched
