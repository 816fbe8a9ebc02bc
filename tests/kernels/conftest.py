"""CuPy on the CPU, for tests of the kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.support.cuda_build import shared_library
from tests.support.fake_cupy import FakeCupy, forget, install


@pytest.fixture
def fake() -> Iterator[FakeCupy]:
    """Instead of CuPy, with the kernels of the shim."""
    before = sys.modules.get("cupy")
    fake = FakeCupy(shared_library())
    install(fake)
    yield fake
    del sys.modules["cupy"]
    if before is not None:
        sys.modules["cupy"] = before
    forget()
