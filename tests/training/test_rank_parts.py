"""Models that are exchanged on a device: the bits of training on the host, no copy in a step."""

from __future__ import annotations

import pytest

from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled

PROGRAM = ROOT / "tests" / "programs" / "device_loops.py"


@pytest.mark.mpi
def test_training_on_a_device_has_the_bits_of_training_on_the_host() -> None:
    run_pooled(
        2, PROGRAM, "adpsgd", "combine", "bf16", "swarm", "swarm-bf16", "allreduce", timeout=120
    )


@pytest.mark.mpi
def test_no_step_on_a_device_copies_a_model_to_the_host_or_waits() -> None:
    run_pooled(2, PROGRAM, "count-adpsgd", "count-swarm-bf16")
