"""The builder of a run's parts, which ranks over MPI and virtual ranks have in common."""

from __future__ import annotations

import numpy as np
import pytest

from mpi_dasgd import algorithms, config
from mpi_dasgd.algorithms.build import RunParts, build_run
from mpi_dasgd.errors import UserError
from mpi_dasgd.transport.virtual.clock import Clock
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.memory import SharedMemory
from mpi_dasgd.transport.virtual.network import Network


def _build(*overrides: str, size: int = 8) -> RunParts:
    return build_run(config.load(None, overrides), size)


def test_parts_are_those_that_the_configuration_names() -> None:
    parts = _build(
        "algorithm.name=swarm", "algorithm.variant=pull", "topology.graph=ring", "codec.name=bf16"
    )
    assert parts.algorithm_cls is algorithms.find("swarm", "pull")
    assert sorted(parts.topology.neighbours(0)) == [1, 7]
    assert parts.codec_config.name == "bf16"
    assert not parts.lockstep
    assert parts.step_rule(1000) == 1.0


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_only_the_slots_that_are_used_are_there_and_auto_is_the_first_codec(name: str) -> None:
    parts = _build(f"algorithm.name={name}")
    capabilities, transport = parts.algorithm_cls.capabilities, parts.config.transport
    assert transport.publication_slots is None
    published = capabilities.uses_publication
    assert parts.publication_slots() == (4 if published else 0)
    assert parts.publication_slots("ipc") == (6 if published else 0)
    chosen = _build(f"algorithm.name={name}", "transport.publication_slots=5")
    assert {chosen.publication_slots(memory) for memory in ("host", "ipc")} == {5 * published}
    assert parts.inbox_slots == (transport.inbox_slots if capabilities.uses_inbox else 0)
    assert parts.codec_config.name == parts.algorithm_cls.codecs[0]
    assert parts.config.codec.name == "auto"


def test_messages_have_room_for_the_words_of_the_algorithm() -> None:
    parts = _build("algorithm.name=sgp", "topology.graph=ring")
    words = parts.algorithm_cls.trailer_words(8)
    assert words > 0
    assert parts.make_codec(0, 1024, np.dtype(np.float32)).layout.trailer_words == words


def test_ranks_draw_different_partners_from_one_seed() -> None:
    parts = _build("codec.name=none", "run.seed=3")
    codec = parts.make_codec(0, 1024, np.dtype(np.float64))
    network = Network(Clock(), SharedMemory(codec.layout, 8), parts.topology)
    draws = [
        parts.make_algorithm(
            VirtualEndpoint(network, rank), codec, np.zeros(1024), lambda exchange: None
        ).rng.random()
        for rank in (0, 1, 0)
    ]
    assert draws[0] == draws[2] != draws[1]
    assert draws[0] == algorithms.peer_rng(3, 0).random()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.variant=none"], "algorithm.variant: 'adpsgd' has no variant 'none'"),
        (["topology.graph=hypercube"], "power of"),
        (
            ["algorithm.name=allreduce", "algorithm.max_attempts=9"],
            "algorithm.max_attempts: 'allreduce' .*has no use for it",
        ),
        (["algorithm.name=allreduce", "codec.name=lattice8"], "'allreduce' cannot use 'lattice8'"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _build(*overrides, size=6)
