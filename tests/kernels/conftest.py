"""CuPy on the CPU, for tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cuda_build import shared_library
from tests.support.fake_cupy import FakeCupy, installed


@pytest.fixture
def fake() -> Iterator[FakeCupy]:
    """Instead of CuPy, with the kernels of the shim."""
    fake = FakeCupy(shared_library())
    with installed(fake):
        yield fake
