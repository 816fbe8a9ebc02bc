"""Sampler: the share of a data set that each rank draws, a new one every epoch."""

from __future__ import annotations

import contextlib
import operator
import zlib
from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import Dataset, DistributedSampler, IterableDataset

from mpi_dasgd.errors import Unreachable, UserError
from mpi_dasgd.training.decentralized import Decentralized

__all__ = ["ShardSampler", "sampler"]

_MOST_RANKS = 64  # whose samplers are compared with this one


def sampler(
    dataset: Sized,
    training: Decentralized,
    *,
    shuffle: bool = True,
    seed: int | None = None,
    drop_last: bool = False,
) -> ShardSampler:
    """Return a sampler by which the ranks share `dataset`.

    ::

        loader = DataLoader(dataset, batch_size=32, sampler=mpi_dasgd.sampler(dataset, training))
        for epoch in range(epochs):
            loader.sampler.set_epoch(epoch)
            for x, y in loader:
                ...

    The indices are those of torch's `DistributedSampler` with as many replicas as ranks compute
    gradients: every epoch has one order of all samples, of which the ranks take turns. A server
    that computes no gradients draws nothing.

    Args:
        dataset: a data set with a length, the same one on all ranks.
        training: what `mpi_dasgd.attach` or `Decentralized` returned.
        shuffle: whether each epoch has an order of its own; else it is that of the data set.
        seed: seed of the orders, the same on all ranks, at least 0; None: `run.seed`.
        drop_last: whether samples that the ranks cannot share evenly are left out; else some are
            drawn twice, so that all ranks draw equally many.

    Raises:
        UserError: the data set has no length or too few samples, or another rank has called this
            function with a data set of another length or with other arguments.
    """
    if not isinstance(training, Decentralized):
        raise UserError(
            "sampler: `training` must be what mpi_dasgd.attach or mpi_dasgd.Decentralized "
            f"returned; got {type(training).__name__}"
        )
    workers = training.algorithm.workers(training.size, training.algorithm.settings)
    length = _length(dataset)
    _require_samples(length, len(workers), drop_last)
    shuffle, drop_last = bool(shuffle), bool(drop_last)
    seed = training.config.run.seed if seed is None else _as_seed(seed)
    if training.rank in workers:
        _compare(training, workers, length=length, seed=seed, shuffle=shuffle, drop_last=drop_last)
    return ShardSampler(
        dataset,
        len(workers),
        training.rank - workers.start if training.rank in workers else None,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )


class ShardSampler(DistributedSampler[Any]):
    """A `DistributedSampler` whose epochs go on by themselves until `set_epoch` is called.

    Args:
        dataset: a data set with a length.
        shards: number of ranks that share it.
        shard: which of them this one is, from 0; None: this rank draws nothing.
        shuffle, seed, drop_last: as `sampler` takes them.
    """

    def __init__(
        self,
        dataset: Sized,
        shards: int,
        shard: int | None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            cast("Dataset[Any]", dataset),  # torch needs its length only
            num_replicas=shards,
            rank=shard or 0,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self._draws = shard is not None
        self._epoch_is_set = False

    def __iter__(self) -> Iterator[int]:
        if not self._draws:
            return iter(())
        indices: Iterator[int] = super().__iter__()
        if not self._epoch_is_set:
            self.epoch += 1  # of the next iteration
        return indices

    def __len__(self) -> int:
        return super().__len__() if self._draws else 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the iterations that follow, all of them until the next call.

        Args:
            epoch: number of the epoch, from 0.
        """
        self._epoch_is_set = True
        super().set_epoch(epoch)


def _length(dataset: Any) -> int:
    """Return the number of samples of a data set.

    Raises:
        UserError: it has none that is known.
    """
    # Some iterable data sets have a length, but no indices either.
    if not isinstance(dataset, IterableDataset):
        with contextlib.suppress(TypeError, NotImplementedError):
            return len(dataset)
    raise UserError(
        f"sampler: `dataset` must have a length and indices; got {type(dataset).__name__}. Let "
        "each rank read its share of a stream: itertools.islice(stream, training.rank, None, "
        "training.size), and each worker of a DataLoader its share of that, by "
        "torch.utils.data.get_worker_info()"
    )


def _require_samples(length: int, shards: int, drop_last: bool) -> None:
    needed = shards if drop_last else 1
    if length < needed:
        raise UserError(
            f"sampler: `dataset` must have at least {needed} samples for {shards} ranks with "
            f"drop_last={drop_last}; got {length}"
        )


def _as_seed(seed: Any) -> int:
    with contextlib.suppress(TypeError):
        if 0 <= (number := operator.index(seed)) < 2**63:
            return number
    raise UserError(f"sampler: `seed` must be an integer in [0, 2**63), or None; got {seed!r}")


def _compare(training: Decentralized, workers: range, **values: int) -> None:
    """Compare `values` with those of other ranks that have come so far, for the first sampler.

    Nobody waits: the ranks of an asynchronous algorithm may be epochs apart. The rank that comes
    later finds what others have left. Later samplers are not compared, as some ranks may have more.
    """
    own = {name: zlib.crc32(f"{name} {values[name]}".encode()) % 2**15 for name in values}
    word = sum(digest << 15 * place for place, digest in enumerate(own.values())) | 1 << 60
    membership = training.endpoint.membership
    if not membership.publish_shards(word):
        return
    for rank in workers[:_MOST_RANKS]:
        other = 0
        if rank != training.rank and not membership.is_unreachable(rank):
            with contextlib.suppress(Unreachable):
                other = membership.read_shards(rank)
        if other in (0, word):
            continue
        differing = [
            f"{name} (here {values[name]})"
            for place, (name, digest) in enumerate(own.items())
            if other >> 15 * place & (2**15 - 1) != digest
        ]
        raise UserError(
            f"sampler: rank {training.rank} and rank {rank} must share one data set in the same "
            f"way, but differ in {', '.join(differing)}: their shards would overlap. Give all "
            "ranks the same data set and arguments; the rank needs no seed of its own"
        )
