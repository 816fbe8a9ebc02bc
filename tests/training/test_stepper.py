"""What a rank gives away reaches the others by the end of each call, and before it waits."""

from __future__ import annotations

import pytest

from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled


@pytest.mark.mpi
def test_nothing_is_left_unflushed_by_any_call_and_any_wait() -> None:
    """Fails, or never ends, without the flush of any one of them."""
    run_pooled(2, ROOT / "tests" / "programs" / "withheld.py", timeout=60)
