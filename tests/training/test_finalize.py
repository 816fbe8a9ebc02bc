"""Results that one rank writes for all: the mean model, its evaluation, and whose models count."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from mpi_dasgd.errors import PeerLost
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.storage.model import load_model
from mpi_dasgd.storage.results import consolidate, results_path
from mpi_dasgd.storage.runfile import RunFile, rank_path
from mpi_dasgd.storage.snapshots import Snapshot, Snapshots
from mpi_dasgd.storage.writer_thread import writer
from mpi_dasgd.tasks.data import Data
from mpi_dasgd.training.evaluator import Evaluator
from mpi_dasgd.training.finalize import RankRoles, RunOutputs, write_results


class FinishedRun:
    """Four ranks with batch norm and one milestone; the weights and means of rank r are r + 1."""

    def __init__(self, directory: Path, statuses: Sequence[str] = ("finished",) * 4) -> None:
        self.directory = directory
        self.model = torch.nn.Sequential(
            torch.nn.BatchNorm1d(3, affine=False), torch.nn.Linear(3, 2, bias=False)
        )
        self.parameters = FlatParameters(self.model)
        self.buffers = ModelBuffers(self.model, set(map(id, self.parameters.parameters)))
        snapshots = Snapshots(directory / "snapshots")
        for rank, status in enumerate(statuses):
            file = RunFile(rank_path(directory, rank), rank=rank, size=4, attributes={})
            with torch.no_grad():
                self.model[1].weight.fill_(rank + 1)
                self.model[0].running_mean.fill_(rank + 1)
            model, buffers = self.parameters.host_view, self.buffers.pack()
            snapshots.save(1, rank, Snapshot(model, buffers, 1.0, 10, 40))
            if status == "running":
                file.flush()
            else:
                file.close(status, {})
        writer().submit(lambda: None).result()

    def write_results(
        self, model_ranks: range, workers: range = range(4), dead: Collection[int] = ()
    ) -> dict[str, float]:
        """Return the weight and the running mean of model.h5."""
        x, y = torch.randn(20, 3), torch.randint(2, (20,))
        evaluator = Evaluator(self.model, self.parameters, self.buffers, Data(x, y, x, y, 2))
        write_results(self.directory, RankRoles(range(4), model_ranks, workers, dead), 1, evaluator)
        state = load_model(self.directory / "model.h5")
        return {name: float(value.double().mean()) for name, value in state.items()}


@pytest.mark.parametrize(
    ("model_ranks", "options", "weight", "mean"),
    [
        (range(1), {"workers": range(1, 4)}, 1, 3),  # a server's own buffers were never trained
        (range(1), {"workers": range(4)}, 1, 2.5),
        (range(4), {}, 2.5, 2.5),
        (range(4), {"dead": {0}}, 2.5, 2.5),  # it died after it had finished
    ],
)
def test_the_mean_model_has_the_buffers_of_the_workers(
    tmp_path: Path, model_ranks: range, options: dict[str, Any], weight: float, mean: float
) -> None:
    state = FinishedRun(tmp_path).write_results(model_ranks, **options)
    assert state["1.weight"] == weight and state["0.running_mean"] == mean
    with h5py.File(results_path(tmp_path)) as file:
        assert file["consensus/mean_test_accuracy"].shape == (1,)


def test_ranks_that_died_before_the_end_are_left_out_of_the_mean_model(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, ("finished", "finished", "finished", "running"))
    state = run.write_results(range(4), workers=range(1, 4), dead={3})
    assert state["1.weight"] == 2 and state["0.running_mean"] == 2.5


def test_a_lost_server_leaves_no_model(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, ("running", "finished", "finished", "finished"))
    with pytest.raises(PeerLost, match=r"model.h5 .* missing: ranks \[0\]"):
        run.write_results(range(1), workers=range(1, 4), dead={0})
    assert not results_path(tmp_path).exists()


def test_outputs_of_an_earlier_part_of_a_run_do_not_count(tmp_path: Path) -> None:
    assert not RunOutputs(tmp_path).complete
    new = RunOutputs(tmp_path)
    FinishedRun(tmp_path).write_results(range(4))
    assert new.complete
    resumed = RunOutputs(tmp_path)
    assert not resumed.complete
    consolidate(tmp_path)
    assert not resumed.complete  # the model is not new
    (tmp_path / "new").write_bytes((tmp_path / "model.h5").read_bytes())
    (tmp_path / "new").replace(tmp_path / "model.h5")
    assert resumed.complete
