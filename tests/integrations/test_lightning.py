"""`lightning.Trainer` with the strategy: see `tests/programs/lightning_loop.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mpi_ranks import ROOT, run_ranks
from tests.support.rank_pool import run_pooled

pytestmark = pytest.mark.mpi

FAILS = """
    import lightning
    import torch
    from mpi4py import MPI

    from mpi_dasgd.integrations.lightning import DecentralizedStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, index):
            if MPI.COMM_WORLD.rank == 1 and self.trainer.global_step == 5:
                raise RuntimeError("a fault of the user")
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(400, 4))
    trainer = lightning.Trainer(
        strategy=DecentralizedStrategy(),
        max_epochs=100_000,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, 8))
"""


def test_trainer(tmp_path: Path) -> None:
    run_pooled(2, ROOT / "tests" / "programs" / "lightning_loop.py", str(tmp_path))


def test_an_exception_on_one_rank_ends_all() -> None:
    done = run_ranks(2, FAILS, check=False)
    assert done.code != 0
    assert done.seconds < 100
    assert "a fault of the user" in done.stderr or "rank 1 has failed" in done.stderr
