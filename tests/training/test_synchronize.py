"""All ranks begin with the same model, or none does; and all end with the mean of the models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mpi_dasgd.errors import PeerLost
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.training import synchronize
from mpi_dasgd.training.agreement import require_agreement
from mpi_dasgd.training.synchronize import broadcast_model, combine_buffers
from tests.support.rank_pool import run_pooled
from tests.support.threaded_ranks import errors_on_ranks, on_ranks


def _model(value: float) -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


def _flat(model: torch.nn.Module) -> tuple[FlatParameters, ModelBuffers]:
    parameters = FlatParameters(model)
    return parameters, ModelBuffers(model, set(map(id, parameters.parameters)))


def test_parameters_and_buffers_become_those_of_rank_0() -> None:
    def program(comm: Any) -> set[float]:
        model = _model(4 - comm.rank)
        broadcast_model(comm, *_flat(model))
        tensors = (*model.parameters(), *model.buffers())
        return {value for tensor in tensors for value in tensor.reshape(-1).tolist()}

    assert on_ranks(3, program) == [{4.0}] * 3


def test_weights_that_differ_after_the_broadcast_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synchronize, "write_bytes", lambda tensor, data: None)
    message = errors_on_ranks(
        2, lambda comm: broadcast_model(comm, *_flat(_model(comm.rank))), PeerLost
    )
    assert message == "rank 1 does not have the same initial weights as rank 0"


class Statistics(torch.nn.Module):
    """Buffers of all kinds; `of_rank` is what ranks differ in."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.frozen = torch.nn.Parameter(torch.full((2,), float(rank)), requires_grad=False)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("seed", torch.tensor([2**53 + 1, -(2**62) - 1, 2**63 - 1]))
        self.register_buffer("mean", torch.arange(6.0).view(2, 3) * (rank + 1))
        self.register_buffer("count", torch.tensor(2**60 + rank))
        self.register_buffer(
            "rotation", torch.polar(torch.ones(2), torch.tensor([0.1, 0.2 * rank]))
        )
        self.register_buffer("flags", torch.tensor([True, False, rank == 1]))
        self.register_buffer("cache", torch.full((rank + 1,), float(rank)), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("empty", torch.empty(0, 3))


def _combine(
    size: int, workers: Sequence[int], rules: dict[str, str]
) -> list[dict[str, torch.Tensor]]:
    def program(comm: Any) -> dict[str, torch.Tensor]:
        module = Statistics(comm.rank)
        buffers = ModelBuffers(module, {id(module.weight)}, {"cache": "keep", **rules})
        combine_buffers(comm, buffers, workers)
        return dict(module.named_buffers()) | {"frozen": module.frozen.detach()}

    return on_ranks(size, program)


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("block", [16, 1 << 24])  # several blocks of a buffer, and one
@pytest.mark.parametrize("workers", [range(3), range(1, 3)])
def test_buffers_that_differ_are_combined_by_their_rules(
    workers: range, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synchronize, "_BLOCK", block)
    before = [dict(Statistics(rank).named_buffers()) for rank in range(3)]
    turned = [before[rank]["rotation"].to(torch.complex128) for rank in workers]
    factor = sum(rank + 1 for rank in workers) / len(workers)
    for rank, after in enumerate(_combine(3, workers, {})):
        assert _equal(after["mean"], torch.arange(6.0).view(2, 3) * factor)
        assert _equal(after["rotation"], (sum(turned) / len(turned)).to(torch.complex64))
        assert _equal(after["count"], torch.tensor(2**60 + 2))
        assert _equal(after["flags"], torch.tensor([True, False, True]))
        assert _equal(after["frozen"], torch.full((2,), factor - 1))
        for name in ("mask", "seed", "empty", "cache"):
            assert _equal(after[name], before[rank][name]), name


def test_rules_can_be_set_by_name() -> None:
    rules = {"m[ae]an": "max", "count": "mean", "f*": "rank0", "rotation": "keep"}
    for rank, after in enumerate(_combine(3, [1, 2], rules)):
        assert _equal(after["mean"], torch.arange(6.0).view(2, 3) * 3)
        assert after["count"].item() == 2**60 + 2  # of 1 and 2, halves up
        assert after["frozen"].tolist() == [1, 1] and after["flags"].tolist() == [True, False, True]
        assert _equal(after["rotation"], dict(Statistics(rank).named_buffers())["rotation"])


def test_what_is_equal_on_all_ranks_is_not_sent() -> None:
    def program(comm: Any) -> list[int]:
        model = torch.nn.BatchNorm1d(1000)
        with torch.no_grad():
            model.num_batches_tracked.fill_(comm.rank)
        combine_buffers(comm, ModelBuffers(model), range(3))
        return comm.sent

    assert on_ranks(3, program) == [[8]] * 3  # the number of batches


def test_a_long_buffer_is_sent_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synchronize, "_BLOCK", 3 * 800)

    def program(comm: Any) -> list[int]:
        model = torch.nn.BatchNorm1d(300)
        model.running_mean.fill_(comm.rank)
        combine_buffers(comm, ModelBuffers(model), range(3))
        assert (model.running_mean == 1).all()
        return comm.sent

    assert on_ranks(3, program) == [[800, 400]] * 3


def test_a_rank_with_nan_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def program(comm: Any) -> list[float]:
        model = torch.nn.BatchNorm1d(2)
        model.running_mean[0] = float("nan") if comm.rank == 1 else comm.rank
        combine_buffers(comm, ModelBuffers(model), range(3))
        return model.running_mean.tolist()

    with caplog.at_level(logging.WARNING):
        assert on_ranks(3, program) == [[1.0, 0.0]] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "buffer running_mean has NaN on ranks [1], but not on all: rule mean went by the others"
    ]


def test_a_rank_that_is_lost_does_not_count() -> None:
    def program(comm: Any) -> float:
        allgather = comm.allgather
        comm.allgather = lambda value: [*allgather(value), None]
        model = torch.nn.BatchNorm1d(1)
        model.running_mean.fill_(comm.rank)
        buffers = ModelBuffers(model)
        require_agreement(comm, {"buffer": buffers.description()})
        combine_buffers(comm, buffers, range(3))
        return model.running_mean.item()

    assert on_ranks(2, program) == [0.5] * 2


def test_a_model_without_buffers_is_no_case_of_its_own() -> None:
    on_ranks(2, lambda comm: combine_buffers(comm, ModelBuffers(torch.nn.ReLU()), range(2)))


def test_a_server_gets_what_the_workers_agree_on() -> None:
    def program(comm: Any) -> float:
        model = torch.nn.BatchNorm1d(1)
        model.running_mean.fill_(5.0 if comm.rank else 0.0)
        combine_buffers(comm, ModelBuffers(model), range(1, 3))
        return model.running_mean.item()

    assert on_ranks(3, program) == [5.0] * 3


PROGRAM = """
import torch, mpi_dasgd
from mpi_dasgd import world

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.linear = torch.nn.Linear(3, 3)
        angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1]))
        for name, buffer in {
            "rotation": torch.polar(torch.ones_like(angles), angles),
            "seed": torch.tensor([2**53 + 1, 2**62 + 12345, -(2**60) - 7, 2**63 - 1]),
            "mask": torch.full((3, 3), float("-inf")).triu(1),
            "nan": torch.tensor([float("nan")]), "flag": torch.tensor([True, False]),
            "byte": torch.tensor([255, 3], dtype=torch.uint8), "half": torch.tensor([1e-4]).half(),
            "third": torch.tensor([1 / 3], dtype=torch.float64), "empty": torch.empty(0),
        }.items():
            self.register_buffer(name + "_", buffer, persistent=name != "mask")
    def forward(self, x):
        return torch.softmax(self.linear(self.norm(x)) + self.mask_[:1], -1)

environment = world.start()
comm = environment.comm
for algorithm in ("adpsgd", "asgd", "easgd", "minibatch", "allreduce"):
    model = Model()
    with torch.no_grad():
        model.norm.running_mean.fill_(comm.rank + 3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = mpi_dasgd.Decentralized(
        model, optimizer, algorithm, total_samples=32, environment=environment
    )
    assert (model.norm.running_mean == 3).all()  # as on rank 0
    while not training.finished:
        if training.computes_gradients:
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            training.step(4)
        else:
            training.serve()
    training.finish()
    own = comm.allgather((training.computes_gradients, model.norm.running_mean.tolist()))
    counts = comm.allgather(model.norm.num_batches_tracked.item())
    training.average()
    for name, buffer in model.named_buffers():
        if not name.startswith("norm"):
            found, given = (b.view(-1).view(torch.uint8) for b in (buffer, before[name]))
            same = torch.equal(found, given) and buffer.dtype == before[name].dtype
            assert same, (algorithm, name, buffer)
    means = torch.tensor([mean for works, mean in own if works], dtype=torch.float64).mean(0)
    assert torch.equal(model.norm.running_mean, means.float()), algorithm
    assert model.norm.num_batches_tracked.item() == max(counts), algorithm
    training.close()
"""


@pytest.mark.mpi
def test_buffers_of_every_type_survive_training_with_and_without_a_server() -> None:
    run_pooled(3, PROGRAM)
