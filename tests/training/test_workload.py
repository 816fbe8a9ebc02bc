"""What a rank computes: batches of its part of the data, and optimizers by name."""

from __future__ import annotations

import pytest
import torch

from mpi_dasgd import config
from mpi_dasgd.errors import UserError
from mpi_dasgd.training.workload import Workload, build_workload


def _build(rank: int, *overrides: str, size: int = 3, workers: range = range(3)) -> Workload:
    settings = ["task.name=breast_cancer", "task.model=logistic", "task.batch_size=8", *overrides]
    return build_workload(config.load(None, settings), rank, size, workers=workers)


def _rows(workload: Workload) -> set[tuple[float, ...]]:
    """The samples of an epoch."""
    batches = len(workload.data.train_x) // 3 // 8
    return {tuple(row.tolist()) for n in range(batches) for row in workload.batches.batch(n)[0]}


def test_a_seed_and_a_rank_give_the_same_weights_and_batches() -> None:
    first, again, other = _build(1), _build(1), _build(2)
    weights = [
        torch.cat([p.flatten() for p in w.model.parameters()]) for w in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(first.batches.batch(7)[0], again.batches.batch(7)[0])
    assert not torch.equal(first.batches.batch(7)[0], other.batches.batch(7)[0])


def test_sharded_data_are_divided_among_those_that_compute() -> None:
    server, *workers = [
        _build(rank, "task.data=sharded", size=4, workers=range(1, 4)) for rank in range(4)
    ]
    shards = [_rows(workload) for workload in workers]
    assert all(shards)
    assert not shards[0] & shards[1] and not shards[1] & shards[2] and not shards[0] & shards[2]
    assert server.batches is not None  # it has some, of no use


def test_a_gradient_is_that_of_the_mean_loss_and_replaces_the_last() -> None:
    workload = _build(0)
    x, y = workload.batches.batch(0)
    losses = [workload.compute_gradient(x, y) for _ in range(2)]
    assert losses[0] == losses[1]
    got = [p.grad.clone() for p in workload.model.parameters() if p.grad is not None]
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(workload.model(x), y), list(workload.model.parameters())
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_optimizer_has_its_options() -> None:
    workload = _build(0, "optimizer.name=AdamW", "optimizer.lr=0.5", "optimizer.options={eps=1e-3}")
    assert isinstance(workload.optimizer, torch.optim.AdamW)
    (group,) = workload.optimizer.param_groups
    assert (group["lr"], group["eps"]) == (0.5, 1e-3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.name=nothing"], "optimizer.name: torch.optim has no optimizer 'nothing'"),
        (["optimizer.name=lr_scheduler"], "has no optimizer 'lr_scheduler'"),
        (
            ["optimizer.options={momentums=1}"],
            "optimizer.options: torch.optim.SGD says: .*momentums",
        ),
        (["optimizer.options={momentum=-1.0}"], "optimizer.options: .*momentum"),
    ],
)
def test_optimizers_that_do_not_exist_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _build(0, *overrides)
