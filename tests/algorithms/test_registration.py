"""Algorithms from outside of the package are known by their names, like those within it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import pytest

from mpi_dasgd import algorithms, config
from mpi_dasgd.algorithms.no_communication import Alone
from mpi_dasgd.config import schema
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import simulate


class Own(Alone):
    """As `alone`, under another name."""

    name = "own"


@pytest.fixture
def registered() -> Iterator[type[algorithms.Algorithm]]:
    yield algorithms.register(Own)
    del algorithms.ALGORITHMS["own"]
    schema.OWN_ALGORITHMS.remove("own")


@pytest.mark.usefixtures("registered")
def test_a_registered_algorithm_is_found_configured_recorded_and_simulated() -> None:
    assert algorithms.find("own") is Own
    keys = ["task.name=quadratic", "optimizer.options={}", "budget.samples=320"]
    settings = config.load(None, ["algorithm.name=own", *keys])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic warns of values that a Literal does not have
        assert json.loads(settings.model_dump_json())["algorithm"]["name"] == "own"
    figures = simulate(settings)
    assert figures["algorithm"] == "own"
    same = simulate(config.load(None, ["algorithm.name=alone", *keys]))
    assert figures["final_distance"] == same["final_distance"]


def test_a_name_is_unknown_until_it_is_registered() -> None:
    with pytest.raises(UserError, match="algorithm.name: 'own' is not known.*valid: adpsgd, swarm"):
        config.load(None, ["algorithm.name=own"])


def test_registering_twice_is_harmless_and_a_name_that_is_taken_is_refused(
    registered: type[algorithms.Algorithm],
) -> None:
    assert algorithms.register(registered) is registered

    class Usurper(Alone):
        name = "adpsgd"

    with pytest.raises(ValueError, match="there is an algorithm 'adpsgd' already"):
        algorithms.register(Usurper)
