"""attach: a PyTorch loop becomes a decentralized one by one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mpi_dasgd import world
from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.config import Config
from mpi_dasgd.training.decentralized import Decentralized

__all__ = ["attach"]


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: str = "adpsgd",
    *,
    samples_per_step: int = 1,
    topology: str = "complete",
    codec: str = "auto",
    total_samples: int | None = None,
    seconds: float | None = None,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    environment: world.World | None = None,
    record: Callable[[ExchangeRecord], None] | None = None,
    buffer_rules: Mapping[str, str] | None = None,
) -> Decentralized:
    """Make ``optimizer.step()`` the decentralized step. Collective.

    ::

        training = mpi_dasgd.attach(model, optimizer, samples_per_step=32)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()                # as before
        training.close()

    Everything that ends in ``optimizer.step()`` works: schedulers, `GradScaler` (a step that it
    skips is none), closures, gradient accumulation, clipping, accelerate, training frameworks.

    Args:
        model, algorithm, topology, codec, total_samples, seconds, config, environment,
        record, buffer_rules: as `Decentralized` takes them.
        optimizer: any torch optimizer over the parameters of `model`, also in a wrapper that keeps
            it as its attribute ``optimizer``.
        samples_per_step: samples that each step counts towards the budget;
            `Decentralized.samples_per_step` may be set at any time.

    Returns:
        The training: ``close()`` ends it, ``average()`` yields the mean model.

    Raises:
        UserError: as `Decentralized` does.
    """
    training = Decentralized(
        model,
        optimizer,
        algorithm,
        topology=topology,
        codec=codec,
        total_samples=total_samples,
        seconds=seconds,
        config=config,
        environment=environment,
        record=record,
        buffer_rules=buffer_rules,
    )
    training.attach(samples_per_step)
    return training
