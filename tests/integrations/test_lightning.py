"""`lightning.Trainer` with the strategy: see `tests/programs/lightning_loop.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled

pytestmark = pytest.mark.mpi


def test_trainer(tmp_path: Path) -> None:
    run_pooled(2, ROOT / "tests" / "programs" / "lightning_loop.py", str(tmp_path))
