"""Runs with steps in the pass of an exchange, and with torch's own: they end with the same bits.

``fused_steps.py CODEC...``: ranks make their steps in turn, so that both runs exchange alike. The
first codec is tried with all algorithms.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW

import mpi_dasgd
from mpi_dasgd.algorithms import ExchangeRecord

STEPS = 9
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1}),
    (Adam, {"lr": 0.01, "amsgrad": True, "fused": True}),
    (AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
]
ALGORITHMS: list[dict[str, str]] = [
    {"algorithm.name": "adpsgd"},
    {"algorithm.name": "adpsgd", "algorithm.order": "adapt_with_combine"},
    {"algorithm.name": "adpsgd", "algorithm.local_steps": "2"},
    {"algorithm.name": "swarm", "algorithm.local_steps": "2"},
]


def train(kind: Any, options: dict[str, Any], config: dict[str, str]) -> tuple[str, int]:
    """Return what a run leaves on this rank, and the steps that torch has made."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 33), nn.Linear(33, 3))
    model[2].bias.requires_grad_(False)
    optimizer = kind(model.parameters(), **options)
    exchanges: list[ExchangeRecord] = []
    training = mpi_dasgd.Decentralized(model, optimizer, config=config, record=exchanges.append)
    torchs_steps = 0
    own = training.local._update

    def update(*args: Any) -> Any:
        nonlocal torchs_steps
        torchs_steps += 1
        return own(*args)

    training.local._update = update  # type: ignore[method-assign]
    comm, rank, size = training.world.comm, training.rank, training.size
    data = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        if step == 5:
            model[2].bias.requires_grad_(True)
        x = torch.randn(8, 20, generator=data)
        y = torch.randint(3, (8,), generator=data)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        cross_entropy(model(x), y).backward()
        for turn in range(size):
            if turn == rank:
                training.step(8)
            comm.Barrier()
    training.close()
    assert training.size == 1 or any(r.partner >= 0 for r in exchanges)
    state = sorted(optimizer.state_dict()["state"].items())
    left = [model.state_dict(), state]
    return repr([_bits(left)]), torchs_steps


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return [(key, _bits(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [_bits(entry) for entry in value]
    return value


def main() -> None:
    torch.set_num_threads(1)
    for codec, (kind, options), algorithm in itertools.product(
        sys.argv[1:], OPTIMIZERS, ALGORITHMS
    ):
        config = {"codec.name": codec, "run.seed": "5", **algorithm}
        expected, torchs = train(kind, options, {**config, "optimizer.fused": "off"})
        assert torchs == STEPS, torchs
        got, torchs = train(kind, options, config)
        assert torchs == 0, torchs
        assert got == expected, (codec, kind, options, algorithm)


main()
