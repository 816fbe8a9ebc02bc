"""Every algorithm on the virtual clock, with a random delay of every message and request."""

from __future__ import annotations

import random

import pytest

from mpi_dasgd import config
from mpi_dasgd.algorithms import Algorithm
from mpi_dasgd.algorithms.catalogue import algorithm_classes
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.network import Network
from tests.support.random_delays import RandomDelays
from tests.support.virtual_ranks import JOB

pytestmark = pytest.mark.slow

EVENTS = 100_000


@pytest.mark.parametrize("ranks", [7, 8])
@pytest.mark.parametrize(
    "algorithm_cls", algorithm_classes(), ids=lambda cls: f"{cls.name} {cls.variant}".strip()
)
def test_no_deadlock_and_no_wait(algorithm_cls: type[Algorithm], ranks: int) -> None:
    """All ranks go on; exactly the algorithms that claim never to wait never yield."""
    overrides = [
        f"algorithm.name={algorithm_cls.name}", f"simulation.ranks={ranks}",
        "simulation.slow_ranks=[-1]",
        "simulation.slow_factor=5", "simulation.compute_time=exponential", "simulation.dimension=1",
        "simulation.gradients=false", f"budget.samples={EVENTS}",
    ]  # fmt: skip
    if algorithm_cls.variant:
        overrides.append(f"algorithm.variant={algorithm_cls.variant}")
    if algorithm_cls.variant == "bipartite":
        overrides.append("topology.graph=ring")
    elif algorithm_cls.name in ("sgp", "osgp"):
        overrides.append("topology.graph=exponential")
    settings = config.load(JOB, overrides)
    rng = random.Random(1)

    def endpoint(network: Network, rank: int) -> VirtualEndpoint:
        return VirtualEndpoint(network, rank, RandomDelays(rng, mean=0.2))

    if algorithm_cls.variant == "bipartite" and ranks % 2:
        with pytest.raises(UserError, match="odd circle"):
            Simulator(settings, endpoint)
        return
    simulation = Simulator(settings, endpoint)
    for algorithm in simulation.algorithms:
        algorithm.start()
    for rank in range(ranks):
        simulation._start_gradient(rank)
    workers = [
        local
        for local, algorithm in zip(simulation.locals, simulation.algorithms, strict=True)
        if algorithm.computes_gradients
    ]
    halfway = 0
    for event in range(EVENTS):
        assert simulation.clock.advance(), f"all ranks wait after {event} events"
        if event == EVENTS // 2:
            halfway = min(local.local_step for local in workers)
    assert min(local.local_step for local in workers) > 1.5 * halfway > 0
    assert (simulation.meter.waits == 0) == algorithm_cls.description.waits.startswith("never")
