"""Models that are exchanged on a device: the bits of training on the host, no copy in a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from mpi_dasgd.algorithms.build import build_run
from mpi_dasgd.config import load
from mpi_dasgd.device.host import HOST
from mpi_dasgd.training.rank_parts import _make_codec
from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled
from tests.support.training import JOB, train

PROGRAM = ROOT / "tests" / "programs" / "device_loops.py"


@pytest.mark.parametrize("codec", ["none", "lattice8"])
@pytest.mark.parametrize(("threads", "expected"), [("auto", 3), (2, 2)])
def test_a_codec_has_the_threads_of_torch_or_those_that_were_asked_for(
    codec: str, threads: str | int, expected: int
) -> None:
    settings = {"algorithm.name": "adpsgd", "codec.name": codec, "codec.threads": threads}
    parameters: Any = SimpleNamespace(vector=np.zeros(2048, np.float32), dtype=np.dtype(np.float32))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made: Any = _make_codec(build_run(load(settings), 2), 0, parameters, HOST)
    finally:
        torch.set_num_threads(before)
    assert made._threads == expected


@pytest.mark.mpi
def test_training_on_a_device_has_the_bits_of_training_on_the_host() -> None:
    run_pooled(
        2, PROGRAM, "adpsgd", "combine", "bf16", "swarm", "swarm-bf16", "allreduce", timeout=120
    )
    run_pooled(1, PROGRAM, "allreduce")


@pytest.mark.mpi
def test_training_with_a_copy_in_host_memory_has_the_bits_of_training_on_the_host() -> None:
    run_pooled(2, PROGRAM, "mirror-swarm-bf16", "mirror-allreduce", "mirror-dpsgd", timeout=120)


@pytest.mark.mpi
def test_no_rank_leaves_a_collective_call_before_the_others_have_given_memory_away() -> None:
    run_pooled(2, PROGRAM, "late-combine")


@pytest.mark.mpi
def test_no_step_on_a_device_copies_a_model_to_the_host_or_waits() -> None:
    run_pooled(2, PROGRAM, "count-adpsgd", "count-swarm-bf16")


@pytest.mark.mpi
def test_a_run_on_a_device_is_resumed_on_the_host_and_the_other_way_round(tmp_path: Path) -> None:
    settings = ["evaluation.count=3", "evaluation.live=true", "checkpoint.count=2"]
    directory = [f"run.directory={tmp_path}", "run.name=run"]

    def accuracies() -> tuple[float, float]:
        with h5py.File(tmp_path / "run" / "results.h5") as file:
            table = file["consensus"]
            return table["mean_test_accuracy"][-1], table["consensus_relative"][-1]

    def train_on_device(*overrides: str) -> None:
        run_pooled(2, PROGRAM, "train", str(JOB), *directory, *settings, *overrides, timeout=120)

    train_on_device("budget.epochs=8")
    accuracy, distance = accuracies()
    assert accuracy > 0.9 and 0 < distance < 0.05
    train(2, tmp_path, *settings, "budget.epochs=9", "run.resume=true", together=True)
    assert accuracies()[0] > accuracy - 0.02
    train_on_device("budget.epochs=10", "run.resume=true")
    assert accuracies()[0] > accuracy - 0.02 and accuracies()[1] < 0.05
