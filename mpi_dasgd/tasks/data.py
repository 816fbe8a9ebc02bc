"""Data sets of the built-in tasks, and a rank's order of batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mpi_dasgd.errors import UserError
from mpi_dasgd.tasks import tables
from mpi_dasgd.tasks.idx import read_images

__all__ = ["Batches", "Data", "load"]


@dataclass(frozen=True)
class Data:
    """A classification task.

    Attributes:
        train_x, test_x: samples, (samples, features), float32, or uint8 to save memory: `inputs`
            converts rows of them to what the network takes.
        train_y, test_y: classes, (samples,), int64.
        classes: number of classes.
        mean, std: mean and standard deviation of all bytes of `train_x`, if it is uint8.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: int
    mean: float = 0.0
    std: float = 1.0

    @property
    def features(self) -> int:
        """Number of values per sample."""
        return self.train_x.shape[1]

    def inputs(self, samples: torch.Tensor) -> torch.Tensor:
        """Return rows of `train_x` or `test_x` as float32, bytes standardized, on their device."""
        if samples.dtype == torch.uint8:
            return samples.float().sub_(self.mean).div_(self.std)
        return samples


def load(name: str, model: str, seed: int, directory: str | None = None) -> Data:
    """Load a data set. Unless it comes split, a fixed fifth of it is for testing.

    Args:
        name: digits (scikit-learn, 1,797 images of 8x8); breast_cancer (scikit-learn, 569 x 30);
            random (noise of the shape that `model` takes, for benchmarks); fashion_mnist (60,000
            and 10,000 images of 28x28, from files).
        model: name of the network.
        seed: seed of the data set `random`.
        directory: folder of the files of fashion_mnist; None: where Debian puts them.

    Raises:
        UserError: the data set does not exist or cannot be trained on, or its files are damaged.
    """
    if name == "fashion_mnist":
        return _images(directory)
    if directory is not None:
        raise UserError(
            f"task.directory: only fashion_mnist is read from files, but task.name is {name!r}; "
            "leave it out"
        )
    if name == "random":
        width, classes = {"mlp_25m": (1024, 1000), "cnn_1m": (784, 10)}.get(model, (64, 10))
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2048, width, generator=generator)
        y = torch.randint(classes, (2048,), generator=generator)
        return Data(x[256:], y[256:], x[:256], y[:256], classes)
    if name == "digits":
        table, classes_of = tables.digits()
        table = table / 16
    elif name == "breast_cancer":
        table, classes_of = tables.breast_cancer()
        table = (table - table.mean(0)) / table.std(0)
    else:
        raise UserError(f"task.name: {name!r} has no training data; it is for `mpi-dasgd simulate`")
    order = np.random.default_rng(0).permutation(len(table))
    features = torch.from_numpy(np.ascontiguousarray(table[order], np.float32))
    labels = torch.from_numpy(np.ascontiguousarray(classes_of[order], np.int64))
    cut = len(table) // 5
    return Data(
        features[cut:], labels[cut:], features[:cut], labels[:cut], int(classes_of.max()) + 1
    )


def _images(directory: str | None) -> Data:
    """Load images and keep them as bytes: float32 would take four times the memory per rank."""
    train_x, train_y, test_x, test_y = read_images(directory)
    # Counted one part at a time: np.std or one bincount would take 8 bytes per byte of the images.
    counts = sum(np.bincount(part.ravel(), minlength=256) for part in np.array_split(train_x, 64))
    levels = np.arange(256)
    mean = float(np.average(levels, weights=counts))
    std = float(np.average((levels - mean) ** 2, weights=counts)) ** 0.5
    return Data(
        torch.tensor(train_x.reshape(len(train_x), -1)),
        torch.tensor(train_y, dtype=torch.int64),
        torch.tensor(test_x.reshape(len(test_x), -1)),
        torch.tensor(test_y, dtype=torch.int64),
        1 + int(max(train_y.max(), test_y.max())),
        mean,
        std or 1.0,
    )


class Batches:
    """The endless mini-batches of a rank, every epoch in a new order fixed by seed, rank and epoch.

    Args:
        data: data set to draw from.
        size: samples per batch.
        seed: seed of the run.
        rank: rank that draws.
        ranks: number of ranks that draw.
        sharded: whether to draw from the samples rank, rank + ranks, ... only.

    Raises:
        UserError: a batch is larger than what the rank draws from.
    """

    def __init__(
        self, data: Data, size: int, *, seed: int, rank: int, ranks: int, sharded: bool
    ) -> None:
        count = len(data.train_x)
        self._shard = np.arange(rank, count, ranks) if sharded else np.arange(count)
        if size > len(self._shard):
            raise UserError(
                f"task.batch_size: {size} is more than the {len(self._shard)} samples a rank draws "
                "from"
            )
        self._data = data
        self._size = size
        self._seed = (seed, rank)
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs, (size, features) float32, and classes, (size,) int64, of one batch.

        Args:
            number: number of the batch, from 0; incomplete batches of an epoch are left out.
        """
        epoch, position = divmod(number, len(self._shard) // self._size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self._seed, epoch]).permutation(self._shard)
        chosen = torch.from_numpy(self._order[position * self._size : (position + 1) * self._size])
        return self._data.inputs(self._data.train_x[chosen]), self._data.train_y[chosen]
