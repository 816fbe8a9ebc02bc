"""accelerate takes the ranks for its processes: see `tests/programs/accelerate_loop.py`."""

from __future__ import annotations

import pytest

from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled

pytestmark = pytest.mark.mpi


def test_loaders_operations_and_a_training() -> None:
    run_pooled(2, ROOT / "tests" / "programs" / "accelerate_loop.py")
