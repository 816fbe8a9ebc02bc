"""Steps of users' optimizers in our passes: the bits of torch, also in turn with torch's own."""

from __future__ import annotations

import copy
import io
import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from mpi_dasgd.errors import Diverged
from mpi_dasgd.kernels.optimizer import OptimizerStep
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.training.local_optimizer import TorchLocalOptimizer

STEPS = 5
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.3}),
    (SGD, {"lr": 0.3, "weight_decay": 0.1, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, "foreach": True}),
    (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True}),
    (SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
    (Adam, {"lr": 0.01}),
    (Adam, {"lr": torch.tensor(0.01), "weight_decay": 0.1, "betas": (0.4, 0.99)}),
    (Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    (Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "eps": 1e-3}),
]


def _model(n: int, channels_last: bool = False) -> nn.Sequential:
    """Return a model whose parameters have multiples of `n` elements."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, n, 2), nn.BatchNorm2d(n), nn.Flatten(), nn.Linear(n, n), nn.Linear(n, n)
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups, in another order than the model's."""
    parameters = [*model.parameters()]
    return [{"params": parameters[::-2]}, {"params": parameters[-2::-2], "weight_decay": 0.03}]


class Pair:
    """A model that torch trains, and an equal one that our steps train."""

    def __init__(self, kind: Any, options: dict[str, Any], **model: bool) -> None:
        n = 3 if kind is SGD else 16
        self.plain, self.model = _model(n, **model), _model(n, **model)
        fused = {} if kind is SGD else {"fused": True}
        self.reference = kind(_groups(self.plain), **{**copy.deepcopy(options), **fused})
        self.optimizer = kind(_groups(self.model), **copy.deepcopy(options))
        self.parameters = FlatParameters(self.model, self.optimizer)
        self.local = TorchLocalOptimizer(self.optimizer, self.parameters)
        self.generator = torch.Generator().manual_seed(4)

    def set_gradients(self, present: Callable[[int], bool] = lambda i: True) -> None:
        pairs = zip(self.plain.parameters(), self.model.parameters(), strict=True)
        for index, (p, q) in enumerate(pairs):
            noise = torch.randn(p.shape, generator=self.generator)
            p.grad = noise.clone() if present(index) else None
            q.grad = noise.clone() if present(index) else None

    def step(self, *, torchs: bool = False) -> None:
        """Make a step of both; ours, or torch's own in ours."""
        self.reference.step()
        self.parameters.gather()
        self.local.begin_step(None)
        if not torchs:
            assert self.local._fused is not None
            made = self.local._fused.prepare()
            assert made is not None, "not served"
        kept = self.local._fused
        self.local._fused = None if torchs else kept
        self.local.apply()
        self.local._fused = kept

    def require_equal(self) -> None:
        pairs = zip(self.model.named_parameters(), self.plain.parameters(), strict=True)
        for (name, p), q in pairs:
            assert torch.equal(p, q), name
            assert p.stride() == q.stride(), name
            ours, theirs = self.optimizer.state.get(p, {}), self.reference.state.get(q, {})
            assert [*ours] == [*theirs], name
            for key in ours:
                assert torch.equal(ours[key], theirs[key]), (name, key)
                assert ours[key].stride() == theirs[key].stride(), (name, key)
                assert ours[key].dtype == theirs[key].dtype, (name, key)


@pytest.fixture(params=SETTINGS, ids=lambda case: f"{case[0].__name__}-{'-'.join(case[1])}")
def pair(request: pytest.FixtureRequest) -> Pair:
    """Models and optimizers of each kind, with two groups."""
    return Pair(*request.param)


def test_steps_have_the_bits_of_torch(pair: Pair) -> None:
    for _ in range(STEPS):
        pair.set_gradients()
        pair.step()
        pair.require_equal()


def test_gradients_may_be_missing_at_any_time(pair: Pair) -> None:
    for step in range(STEPS):
        pair.set_gradients(lambda i: (i * 7 + step * 3) % 5 > 1)  # noqa: B023
        pair.step()
        pair.require_equal()
    pair.set_gradients(lambda i: False)
    pair.step()
    pair.require_equal()


def test_torch_and_passes_go_on_from_each_other(pair: Pair) -> None:
    if not isinstance(pair.optimizer, SGD):
        for group in pair.optimizer.param_groups:
            group["fused"] = True  # torch's steps in between have the bits of the reference
    for step in range(2 * STEPS):
        pair.set_gradients(lambda i: (i + step) % 4 > 0 or step > 5)  # noqa: B023
        pair.step(torchs=step % 3 == 0 or step == 4)
        pair.require_equal()
