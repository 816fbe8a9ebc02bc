"""Ranks that must hold one model: a write on one rank only is found, and rounding is not."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.replica_check import INTERVAL, ReplicaCheck
from mpi_dasgd.transport.membership import Membership
from mpi_dasgd.transport.virtual.memory import SharedMemory
from tests.transport.test_membership import make_memory

SIZE = 9 * 1024


class Rank:
    """A rank with its model."""

    def __init__(self, memory: SharedMemory, rank: int, ranks: int, model: np.ndarray) -> None:
        self.x = model.copy()
        membership = Membership(memory, rank, ranks, heartbeat_timeout=1.0)
        endpoint: Any = SimpleNamespace(
            membership=membership,
            refresh_progress=partial(membership.refresh_progress, range(ranks)),
        )
        self.check = ReplicaCheck(endpoint, self.x, "some")


def _ranks(count: int) -> list[Rank]:
    memory = make_memory(count)
    model = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    model[-500:] = 0  # padding
    return [Rank(memory, rank, count, model) for rank in range(count)]


def _step(ranks: list[Rank], steps: range) -> None:
    for step in steps:
        for rank in ranks:
            rank.check.after_step(step)


def test_equal_models_and_rounding_pass() -> None:
    ranks = _ranks(3)
    rng = np.random.default_rng(2)
    for step in range(1, 10 * INTERVAL):
        ranks[1].x *= 1 + 1e-7 * rng.normal(size=SIZE).astype(np.float32)
        _step(ranks, range(step, step + 1))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_write_on_one_rank_is_found_with_its_number_on_all_ranks(ranks: int) -> None:
    all_ranks = _ranks(ranks)
    _step(all_ranks, range(1, INTERVAL + 10))
    all_ranks[1].x[100:110] = 5.0
    steps = range(INTERVAL + 10, 2 * INTERVAL + 1)
    _step(all_ranks, steps)
    for rank in all_ranks:
        with pytest.raises(UserError, match="after step 128 ranks .* have another one") as found:
            rank.check.after_step(2 * INTERVAL + 1)
        if ranks > 2:
            assert r"ranks [1] have another" in str(found.value)


def test_ranks_that_are_behind_are_compared_at_their_own_step() -> None:
    """Words of other nodes are read late; a shadow publishes none."""
    one, other = _ranks(2)
    for step in range(1, 5 * INTERVAL):
        one.check.after_step(step)
        if step == INTERVAL:
            other.x[:] = one.x
            other.check.after_step(step)
        one.x += 1.0  # training goes on
