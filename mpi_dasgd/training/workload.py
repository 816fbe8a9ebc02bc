"""What one rank computes: data, model, optimizer, batches, and the straggler that slows it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.straggler import Straggler
from mpi_dasgd.tasks import data as tasks
from mpi_dasgd.tasks import models
from mpi_dasgd.tasks.data import Batches, Data

__all__ = ["Workload", "build_workload"]


@dataclass(frozen=True)
class Workload:
    """What one rank computes gradients of, and how fast.

    Attributes:
        data: training and test data of the task.
        model: model on the device of this rank, with initial weights of this rank's own.
        optimizer: optimizer over the parameters of `model`.
        batches: batches that this rank draws, by its local step.
        straggler: slows this rank down, if the run says so.
    """

    data: Data
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    straggler: Straggler

    def compute_gradient(
        self, x: torch.Tensor, y: torch.Tensor, network: torch.nn.Module | None = None
    ) -> float:
        """Compute the gradient of the mean cross-entropy over a batch; return that loss.

        Args:
            x: inputs, (batch, ...), as `data` has them.
            y: classes, (batch,), int64.
            network: module around `model` to call instead of it.
        """
        return self.queue_gradient(x, y, network).item()

    def queue_gradient(
        self, x: torch.Tensor, y: torch.Tensor, network: torch.nn.Module | None = None
    ) -> torch.Tensor:
        """As `compute_gradient`; return the loss, (), which a GPU may still have to compute."""
        self.optimizer.zero_grad()
        loss = cross_entropy((network or self.model)(x), y)
        loss.backward()
        return loss.detach()


def build_workload(
    config: Config, rank: int, size: int, *, workers: range, device: str = "cpu"
) -> Workload:
    """Build what `rank` computes, and seed its random numbers.

    Args:
        config: configuration of the run.
        rank, size: this rank, and the number of ranks.
        workers: ranks that compute gradients; sharded data are divided among them.
        device: torch's name of the device that the model is on.

    Raises:
        UserError: a task, a model or an optimizer that does not exist, or its options.
    """
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    torch.manual_seed(config.run.seed * 1000003 + rank)
    task = config.task
    data = tasks.load(task.name, task.model, config.run.seed, task.directory)
    model = models.build(task.model, data.features, data.classes).to(device)
    return Workload(
        data,
        model,
        _build_optimizer(config, model),
        Batches(
            data,
            task.batch_size,
            seed=config.run.seed,
            rank=max(0, rank - workers.start),  # a server draws none
            ranks=max(1, len(workers)),
            sharded=task.data == "sharded",
        ),
        Straggler(config.straggler, rank, size, config.run.seed),
    )


def _build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    name, options = config.optimizer.name, config.optimizer.options
    optimizer_cls: Any = getattr(torch.optim, name, None)
    known = isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)
    if not known:
        raise UserError(
            f"optimizer.name: torch.optim has no optimizer {name!r}; for example SGD, AdamW"
        )
    try:
        return optimizer_cls(model.parameters(), lr=config.optimizer.lr, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.options: torch.optim.{name} says: {error}") from error
