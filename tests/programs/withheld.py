"""Swaps that give memory away are made in `Endpoint.flush` alone: who forgets to call it is seen.

No call of a training may return, and none may wait for other ranks, with swaps that are not flushed
yet: others would wait for them for as long as this rank's program does something else.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from mpi4py import MPI

import mpi_dasgd
from mpi_dasgd.training.state_dict import state_dict
from mpi_dasgd.transport.control_words import Words
from mpi_dasgd.transport.rma import endpoint as rma_endpoint
from tests.support.mpi_ranks import parallel_assert

COMM = MPI.COMM_WORLD
RUNS: list[dict[str, Any]] = [
    {"algorithm.name": "adpsgd"},
    {"algorithm.name": "adpsgd", "algorithm.variant": "bipartite", "topology.graph": "ring"},
    {"algorithm.name": "swarm", "algorithm.local_steps": 3},
    {"algorithm.name": "asgd"},
    {"algorithm.name": "dpsgd"},
]


class Withheld:
    """A release whose swaps are made when it is flushed."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._swaps: list[tuple[int, int, int, int, bool]] = []
        self.made = 0

    def swap(
        self, rank: int, index: int, expected: int, new: int, *, required: bool = False
    ) -> None:
        self._swaps.append((rank, index, expected, new, required))

    def flush(self) -> None:
        for *swap, required in self._swaps:
            assert self._words.swap(*swap) or not required, swap
        self.made += len(self._swaps)
        self._swaps.clear()

    @property
    def is_pending(self) -> bool:
        return bool(self._swaps)


class Run:
    """One model in training."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.training = mpi_dasgd.Decentralized(
            self.model, optimizer, config={"transport.stall_timeout": 10, **settings}
        )
        self.left_behind: list[str] = []
        self.look("the constructor")

    def look(self, after: str) -> None:
        """Note `after` if something is not flushed."""
        if self.training.endpoint.release.is_pending:
            self.left_behind.append(after)

    def step(self) -> None:
        if self.training.computes_gradients:
            self.training.optimizer.zero_grad()
            (self.model(torch.randn(8, 4)) - COMM.rank).pow(2).mean().backward()
            self.training.step(8)
            self.look("step")
        else:
            self.training.serve()
            self.look("serve")


def run(settings: dict[str, Any]) -> None:
    """Make every call of a training."""
    run = Run(settings)
    training = run.training
    for _ in range(20 + 10 * COMM.rank):
        run.step()
        state_dict(training)
        run.look("state_dict")
    training.average()
    run.look("average")
    run.step()
    with training.paused():
        run.look("the beginning of paused")
    run.look("paused")
    run.step()
    with training.mean_model():
        run.look("the beginning of mean_model")
    run.look("mean_model")
    run.step()
    if training.computes_gradients:
        training.finish()
    else:
        while not training.finished:
            run.step()
        training.finish()
    run.look("finish")
    release: Any = training.endpoint.release
    training.close()
    run.look("close")
    parallel_assert(COMM, not run.left_behind, f"{settings}: {sorted(set(run.left_behind))}")
    parallel_assert(COMM, release.made > 0, f"{settings}: nothing was given away")


def run_two_models() -> None:
    """Rank 0 answers rank 1 in a step of the second model while it waits at the end of the first.

    Else both would wait for ever: rank 1 comes to the end of the first model after that step.
    """
    pair = {"algorithm.variant": "bipartite", "algorithm.order": "adapt_then_combine"}
    settings = {"algorithm.name": "adpsgd", "topology.graph": "ring", **pair}
    first, second = Run(settings), Run(settings)
    if COMM.rank == 1:
        second.step()
    first.training.finish()
    second.training.close()
    first.training.close()
    left_behind = first.left_behind + second.left_behind
    parallel_assert(COMM, not left_behind, f"two models: {left_behind}")


if __name__ == "__main__":
    with mock.patch.object(
        rma_endpoint, "make_release", lambda comm, words, device: Withheld(words)
    ):
        for settings in RUNS:
            run(settings)
        run_two_models()
