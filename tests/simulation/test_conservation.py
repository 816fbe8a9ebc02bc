"""The conservation oracle: it follows weighted updates, and sees what is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.simulation.conservation import total_mass
from mpi_dasgd.simulation.simulator import Simulator

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"


@pytest.mark.parametrize("algorithm", ["adpsgd", "sgp"])
def test_a_change_that_no_gradient_made_is_seen(algorithm: str) -> None:
    overrides = [f"algorithm.name={algorithm}", "simulation.ranks=4", "budget.samples=400"]
    simulation = Simulator(config.load(JOB, [*overrides, "topology.graph=exponential"]))
    before = simulation.oracle.expected_sum.copy()
    simulation.run()
    memory = simulation.network.memory

    def error() -> float:
        mass = total_mass(simulation.algorithms, memory)
        return simulation.oracle.error(mass, simulation.models)

    assert error() < 1e-12
    assert np.abs(simulation.oracle.expected_sum - before).max() > 1, "gradients have moved it"
    simulation.models[2] *= 1.001
    assert error() > 1e-5
