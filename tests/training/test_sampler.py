"""Sampler: the shards of torch's DistributedSampler, over the ranks that compute gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from mpi_dasgd.training.sampler import ShardSampler
from tests.support.rank_pool import run_pooled


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_are_those_of_torch(
    length: int, shards: int, shuffle: bool, drop_last: bool
) -> None:
    if drop_last and length < shards:
        return
    options = {"shuffle": shuffle, "seed": 5, "drop_last": drop_last}
    for shard in range(shards):
        own = ShardSampler(range(length), shards, shard, **options)
        reference = DistributedSampler(range(length), shards, shard, **options)
        assert len(own) == len(reference)
        for epoch in (0, 1, 4, 4):
            own.set_epoch(epoch)
            reference.set_epoch(epoch)
            assert list(own) == list(reference)


def test_epochs_differ_without_set_epoch_too() -> None:
    """With torch's sampler every epoch has the same order unless one thinks of `set_epoch`."""
    own = ShardSampler(range(50), 2, 1)
    epochs = [list(own) for _ in range(3)]
    assert all(a != b for a, b in itertools.pairwise(epochs))
    for epoch in range(3):
        own.set_epoch(epoch)
        assert list(own) == list(own) == epochs[epoch]


def test_server_draws_nothing() -> None:
    loader = DataLoader(torch.arange(10), sampler=ShardSampler(range(10), 3, None))
    assert len(loader) == 0 and list(loader) == []


PROGRAM = """
import sys, torch, mpi_dasgd
from mpi_dasgd.errors import UserError
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

def training_of(algorithm):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = {"algorithm.name": algorithm, "run.seed": 3}
    return mpi_dasgd.Decentralized(model, optimizer, config=config)

data = TensorDataset(torch.arange(11.0)[:, None])
for algorithm in ("adpsgd", "asgd"):
    with training_of(algorithm) as training:
        sampler = mpi_dasgd.sampler(data, training)
        loader = DataLoader(data, 2, sampler=sampler)
        drawn = training.world.comm.allgather([int(v) for x, in loader for v in x])
        assert sorted({v for own in drawn for v in own}) == list(range(11)), drawn
        if training.computes_gradients:
            workers = 2 if algorithm == "adpsgd" else 1
            rank = training.rank + workers - 2  # the server is rank 0
            assert drawn[training.rank] == list(DistributedSampler(data, workers, rank, seed=3))
        else:
            assert drawn[training.rank] == []

# Nothing that has no shards, or none that are equally long.
class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))
    def __len__(self):
        return 10

with training_of("adpsgd") as training:
    for call, words in (
        (lambda: mpi_dasgd.sampler(Stream(), training), "islice"),
        (lambda: mpi_dasgd.sampler(iter(data), training), "must have a length"),
        (lambda: mpi_dasgd.sampler([], training), "at least 1 samples"),
        (lambda: mpi_dasgd.sampler([1], training, drop_last=True), "at least 2 samples"),
        (lambda: mpi_dasgd.sampler(data, training, seed=-1), "got -1"),
        (lambda: mpi_dasgd.sampler(data, training, seed=1.5), "got 1.5"),
        (lambda: mpi_dasgd.sampler(training, data), "got TensorDataset"),
    ):
        try:
            call()
        except UserError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)

# The rank that comes second finds that the shards would overlap.
for differing in ({"seed": 7}, {"shuffle": False}, {"drop_last": True}, {"length": 9}):
    with training_of("adpsgd") as training:
        comm = training.world.comm
        if training.rank == 0:
            mpi_dasgd.sampler(range(8), training)
        comm.Barrier()
        if training.rank == 1:
            options = dict(differing)
            try:
                mpi_dasgd.sampler(range(options.pop("length", 8)), training, **options)
            except UserError as error:
                (name, value), = differing.items()
                assert f"differ in {name} (here {value})" in str(error), error
            else:
                raise AssertionError(differing)
            mpi_dasgd.sampler(range(5), training)  # of rank 1 only: it is not compared
"""


@pytest.mark.mpi
def test_ranks_share_the_data_or_are_told() -> None:
    run_pooled(2, PROGRAM)
