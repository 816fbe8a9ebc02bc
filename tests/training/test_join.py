"""Ranks that leave before others: shadows take part in the steps that others still make."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.simulation.conservation import total_mass
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.training.join import Shadow
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.network import Network
from tests.support.mpi_ranks import ROOT
from tests.support.random_delays import RandomDelays
from tests.support.rank_pool import run_pooled
from tests.support.virtual_ranks import JOB
from tests.training.test_budget import SETTINGS

POLL = 0.05  # virtual time between two looks of a shadow
RANKS = 6


class _Leaving(Simulator):
    """Virtual ranks of which each leaves after a number of steps of its own, then is a shadow."""

    def __init__(self, settings: config.Config, last_steps: list[int]) -> None:
        rng = random.Random(3)

        def endpoint(network: Network, rank: int) -> VirtualEndpoint:
            return VirtualEndpoint(network, rank, RandomDelays(rng, mean=0.2))

        super().__init__(settings, endpoint)
        self.last_steps = last_steps
        self.left: set[int] = set()
        self.ended: dict[int, int] = {}  # steps of each rank, once it is no shadow any more
        self.shadowed = 0
        self._shadows = [
            Shadow(algorithm, local, self, on_begin=self._count)
            for algorithm, local in zip(self.algorithms, self.locals, strict=True)
        ]

    def _count(self, step: int) -> None:
        assert step <= max(self.last_steps), "a shadow went further than any rank"
        self.shadowed += 1

    def refresh(self) -> None:
        pass

    def have_reached(self, activity: Activity) -> bool:
        assert activity is Activity.SHADOWING
        return len(self.left) == self.size

    def report(self, activity: Activity) -> None:
        pass

    def newest_step(self) -> int:
        return max(self.network.gradient_counts)

    def _start_gradient(self, rank: int) -> None:
        if self.locals[rank].local_step < self.last_steps[rank]:
            super()._start_gradient(rank)
        else:
            self.left.add(rank)
            self._poll(rank)

    def _poll(self, rank: int) -> None:
        if self._shadows[rank].poll(Activity.SHADOWING):
            self.ended[rank] = self.locals[rank].local_step
        else:
            self.clock.after(POLL, lambda: self._poll(rank))


@pytest.mark.parametrize(
    "last_steps",
    [
        [4, 4, 4, 4, 4, 4],
        [0, 7, 7, 7, 7, 7],  # one leaves before its first step
        [13, 0, 0, 0, 0, 0],  # one is left over
        [3, 11, 5, 9, 5, 12],
        [12, 1, 12, 12, 6, 12],
    ],
    ids=str,
)
@pytest.mark.parametrize(("algorithm", "graph", "extra"), SETTINGS)
def test_all_ranks_end_after_the_last_step_of_any(
    algorithm: str, graph: str, extra: list[str], last_steps: list[int]
) -> None:
    """With random delays; and the shadows conserve what exchanges must."""
    settings = config.load(
        JOB,
        [
            f"algorithm.name={algorithm}", f"topology.graph={graph}", f"simulation.ranks={RANKS}",
            "simulation.compute_time=exponential", "simulation.gradients=false",
            "budget.samples=10_000", *extra,
        ],
    )  # fmt: skip
    simulation = _Leaving(settings, last_steps)
    before = simulation.models.mean(0)
    for one in simulation.algorithms:
        one.start()
    for rank in range(RANKS):
        simulation._start_gradient(rank)
    for _ in range(100_000):
        if not simulation.clock.advance():
            break
    longest = max(last_steps)
    assert simulation.ended == dict.fromkeys(range(RANKS), longest)
    assert simulation.shadowed == sum(longest - last for last in last_steps)
    if algorithm != "allreduce":
        for one, local in zip(simulation.algorithms, simulation.locals, strict=True):
            one.absorb(local.local_step)
        mean = total_mass(simulation.algorithms, simulation.network.memory) / RANKS
        np.testing.assert_allclose(mean, before, rtol=1e-12, atol=1e-14)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_leave_when_they_like(ranks: int) -> None:
    """Every algorithm; `allreduce` against one process; two models at once; budgets; the end."""
    run_pooled(ranks, ROOT / "tests" / "programs" / "leaving.py", timeout=120)
