"""AD-PSGD in its three variants: effective step, contraction, conservation, waiting."""

from __future__ import annotations

import random
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import algorithms, codecs, config, topology
from mpi_dasgd.algorithms.adpsgd import ADPSGD
from mpi_dasgd.algorithms.adpsgd_bipartite import BipartiteADPSGD
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
from tests.support.virtual_ranks import JOB, Fixed, Ranks, dispersion, effective_step, run

SLOW = "simulation.slow_ranks=[0]"
AVERAGE, GRADIENT = "algorithm.order=adapt_with_combine", "algorithm.order=adapt_then_combine"
BIPARTITE = "algorithm.variant=bipartite"
PULL = "algorithm.variant=pull"
GRAPH = "topology.graph=bipartite_exponential"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (AVERAGE,),
        (AVERAGE, "simulation.latency=0.7"),
        (GRADIENT, "simulation.latency=0"),
        (BIPARTITE, GRAPH),
        (BIPARTITE, "topology.graph=ring", "simulation.latency=0.7"),
        (BIPARTITE, GRAPH, GRADIENT),
    ],
    ids=" ".join,
)
def test_an_average_of_pairs_has_the_effective_step_one(settings: tuple[str, ...]) -> None:
    small = "simulation.ranks=8", "budget.samples=2000"
    assert effective_step(*small, *settings) == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "half"), [(AVERAGE, 1.0), (GRADIENT, 0.5)])
@pytest.mark.parametrize(("compute", "variation"), [("exponential", 1.0), ("constant", 0.0)])
def test_effective_step_of_pull_is_as_documented(
    order: str, half: float, compute: str, variation: float
) -> None:
    """(1 or 1/2) / (1 - (1 - cv^2)/4), cv the coefficient of variation of the compute times."""
    even = compute == "constant"
    settings = [PULL, order, f"simulation.compute_time={compute}", "optimizer.lr=0.002"]
    settings += ["simulation.latency=0", f"budget.samples={1500 if even else 6000}"]
    found = effective_step(*settings, seeds=1 if even else 2)
    assert found == pytest.approx(half / (1 - (1 - variation) / 4), abs=0.03)
    if compute == "exponential":
        assert found == pytest.approx({AVERAGE: 1.0, GRADIENT: 0.51}[order], abs=0.03)


@pytest.mark.slow
def test_average_first_has_a_larger_consensus_distance_under_noise() -> None:
    settings = ["simulation.noise=5", "optimizer.lr=0.05", "simulation.latency=0"]
    first, last = (run(*settings, order)["final_disagreement"] for order in (AVERAGE, GRADIENT))
    assert 1.5 < first / last < 5


# Contraction of the dispersion sum_i |x_i - mean|^2 by one exchange, no gradients.


def _after_each_exchange(models: np.ndarray, settings: AlgorithmConfig, graph: Any) -> list[float]:
    """Dispersion after an exchange, for every rank that may begin it and every partner."""
    found = []
    for rank, partner in permutations(range(len(models)), 2):
        if partner in graph.neighbours(rank):
            ranks = Ranks(models.copy(), settings, graph)
            ranks.locals[rank].gradient[:] = 0
            algorithm: Any = ranks.algorithms[rank]
            exchange = getattr(algorithm, "_pairs", None) or algorithm._pulls
            exchange._rng = Fixed(partner)
            assert ranks.step(rank)
            found.append(dispersion(ranks.now()))
    return found


@pytest.mark.parametrize(
    ("variant", "theory"),
    [("pair", lambda n: 1 - 1 / (n - 1)), ("pull", lambda n: 1 - (1 + 1 / n) / (2 * (n - 1)))],
)
@pytest.mark.parametrize("order", ["adapt_then_combine", "adapt_with_combine"])
def test_contraction_on_the_complete_graph_over_all_edges(
    variant: str, order: str, theory: Any
) -> None:
    models = np.random.default_rng(1).normal(size=(8, 5))
    settings = AlgorithmConfig(variant=variant, order=order)
    after = _after_each_exchange(models, settings, topology.build("complete", 8))
    assert np.mean(after) / dispersion(models) == pytest.approx(theory(8), rel=1e-12)


@pytest.mark.slow
def test_contraction_per_event_of_pair_in_a_long_run() -> None:
    ranks = Ranks(np.zeros((8, 32)), AlgorithmConfig())
    dice, values = random.Random(1), np.random.default_rng(1)
    for local in ranks.locals:
        local.gradient[:] = 0
    ratios = []
    for event in range(2000):
        if event % 50 == 0:
            ranks.models[:] = values.normal(size=ranks.models.shape)
        ranks.refresh()
        before = dispersion(ranks.now())
        assert ranks.step(dice.randrange(8))
        ratios.append(dispersion(ranks.now()) / before)
    assert np.mean(ratios) == pytest.approx(1 - 1 / 7, rel=0.01)


def test_contraction_per_event_of_pull_on_poisson_clocks() -> None:
    """No publication is used up, so that a simulation as it is agrees with theory."""
    ratios = []
    for seed in range(25):
        settings = [
            PULL, "simulation.ranks=8", "simulation.gradients=false", "simulation.latency=0",
            "simulation.compute_time=exponential", "simulation.dimension=64", "budget.samples=160",
            f"run.seed={seed}",
        ]  # fmt: skip
        simulation = Simulator(config.load(JOB, settings))
        seen: list[float] = []
        for algorithm in simulation.algorithms:
            pulls: Any = algorithm

            def record(exchange: Any, seen: list[float] = seen, at: Any = simulation) -> None:
                seen.append(dispersion(at.models))

            pulls.records.record = record
        simulation.run()
        ratios += [after / before for before, after in pairwise(seen)]
    assert np.mean(ratios) == pytest.approx(1 - (1 + 1 / 8) / 14, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "degree"),
    [
        ("ring", None),
        ("complete", None),
        ("exponential", None),
        ("hypercube", None),
        ("torus", None),
        ("bipartite_exponential", None),
        ("random_regular", 3),
    ],
)
def test_contraction_on_graphs_is_their_spectral_constant(graph: str, degree: int | None) -> None:
    """From the slowest mode, over all edges: 1 - lambda_2 / (n r), lambda_2 of the Laplacian."""
    size = 16
    built = topology.build(graph, size, degree=degree)
    laplacian = np.zeros((size, size))
    for i, j in built.edges:
        laplacian[[i, j, i, j], [i, j, j, i]] += [1, 1, -1, -1]
    values, vectors = np.linalg.eigh(laplacian)
    constant = 1 - values[1] / (size * built.degree(0))
    slowest = np.ascontiguousarray(vectors[:, 1:2])
    after = _after_each_exchange(slowest, AlgorithmConfig(), built)
    assert np.mean(after) / dispersion(slowest) == pytest.approx(constant, rel=1e-9)
    # and from anywhere a run contracts at least as fast
    anywhere = np.random.default_rng(2).normal(size=(size, 4))
    assert np.mean(
        _after_each_exchange(anywhere, AlgorithmConfig(), built)
    ) <= constant * dispersion(anywhere)


# Conservation and waiting.


@pytest.mark.parametrize(
    "settings",
    [
        (AVERAGE,),
        (BIPARTITE, "topology.graph=ring"),
        (BIPARTITE, "topology.graph=ring", GRADIENT),
        (BIPARTITE, GRAPH, "transport.inbox_slots=1"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("latency", [0, 0.3])
def test_the_sum_is_conserved_and_all_of_it_comes_home(
    settings: tuple[str, ...], latency: float
) -> None:
    simulation = Simulator(
        config.load(
            JOB,
            [
                f"simulation.latency={latency}", "simulation.compute_time=exponential", SLOW,
                "simulation.ranks=8", "simulation.noise=1", "budget.samples=800", *settings,
            ],
        )
    )  # fmt: skip
    figures: Any = simulation.run()
    assert figures["exchanges"] > 150
    assert figures["conservation_error"] < 1e-12
    # drained: nothing is in flight any more
    np.testing.assert_allclose(simulation.models.sum(0), simulation.oracle.expected_sum, rtol=1e-11)


@pytest.mark.parametrize("settings", [(AVERAGE,), (PULL,), (PULL, GRADIENT)], ids=" ".join)
@pytest.mark.parametrize("latency", [0, 0.5])
def test_pair_and_pull_never_wait(settings: tuple[str, ...], latency: float) -> None:
    figures = run(*settings, f"simulation.latency={latency}", SLOW, "budget.samples=1000")
    assert figures["waits"] == 0
    assert figures["exchanges"] > 400


@pytest.mark.parametrize(
    ("ranks", "graph", "latency"),
    [(2, "complete", 0.3), (8, "ring", 0), (16, "ring", 1.0), (16, "hypercube", 0.05)],
)
def test_bipartite_waits_and_does_not_deadlock(ranks: int, graph: str, latency: float) -> None:
    simulation = Simulator(
        config.load(
            JOB,
            [
                BIPARTITE, f"topology.graph={graph}", f"simulation.ranks={ranks}",
                f"simulation.latency={latency}", "simulation.compute_time=exponential",
                "optimizer.lr=0.001", "budget.samples=3000",
            ],
        )
    )  # fmt: skip
    figures: Any = simulation.run()
    assert figures["gradients"] == 3000  # else the clock has run out of events: all wait
    assert figures["waits"] > 500
    assert min(local.local_step for local in simulation.locals) > 0.4 * 3000 / ranks
    active = [a.active for a in simulation.algorithms if isinstance(a, BipartiteADPSGD)]
    assert sum(active) == ranks / 2 and not active[0]


def test_a_passive_straggler_holds_up_who_draws_it_and_pair_does_not() -> None:
    slow = ["simulation.slow_ranks=[0]", "simulation.slow_factor=100", "budget.samples=1000"]
    ring = "topology.graph=ring"
    assert run(ring, *slow)["wait_time"] == 0
    usual = run(BIPARTITE, ring, "budget.samples=1000")["wait_time"]
    assert run(BIPARTITE, ring, *slow)["wait_time"] > 2 * usual


def test_both_sides_of_bipartite_end_at_the_same_mean() -> None:
    models = np.array([[0.0, 8.0], [4.0, 2.0]])
    ranks = Ranks(models, AlgorithmConfig(variant="bipartite"))
    active, passive = 1, 0
    for local in ranks.locals:
        local.gradient[:] = 0
    assert ranks.step(active)  # asks
    assert not ranks.step(active)  # waits
    assert ranks.step(passive)
    np.testing.assert_array_equal(models[passive], [2.0, 5.0])
    assert ranks.step(active)
    np.testing.assert_array_equal(models[active], [2.0, 5.0])


def test_an_answer_that_cannot_be_sent_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    models = np.array([[0.0], [4.0]])
    ranks = Ranks(models, AlgorithmConfig(variant="bipartite"))
    for local in ranks.locals:
        local.gradient[:] = 0
    ranks.step(1)
    with monkeypatch.context() as full:
        full.setattr(ranks.algorithms[0].endpoint, "acquire_send_buffer", lambda rank: None)
        ranks.step(0)
        assert models[0] == 0 and not ranks.algorithms[0].is_drained
    ranks.algorithms[0].absorb(1)
    assert ranks.step(1)
    assert (models == 2).all() and ranks.algorithms[0].is_drained


def test_an_active_rank_gives_up_a_partner_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    models = np.array([[0.0], [4.0], [8.0], [12.0]])
    ranks = Ranks(models, AlgorithmConfig(variant="bipartite"), topology.build("ring", 4))
    algorithm: Any = ranks.algorithms[1]
    ranks.step(1)
    (asked,) = {algorithm._awaiting_reply_from}
    assert not ranks.step(1)
    alive = [rank for rank in (0, 2) if rank != asked]
    monkeypatch.setattr(algorithm.endpoint, "neighbours", lambda: alive)
    assert ranks.step(1)
    assert (
        models[1] == 2 and algorithm._awaiting_reply_from == alive[0]
    )  # two gradients, no average; sends a new request


# Codecs and refusals.


@pytest.mark.slow
@pytest.mark.parametrize("codec", sorted(set(codecs.CODECS) - {"none"}))
@pytest.mark.parametrize("settings", [(BIPARTITE, "topology.graph=ring"), (AVERAGE,), (PULL,)])
def test_every_codec(codec: str, settings: tuple[str, ...]) -> None:
    figures = run(
        f"codec.name={codec}", "simulation.dtype=float32", "simulation.ranks=4",
        "simulation.dimension=64", "simulation.noise=1", "budget.samples=600", *settings,
    )  # fmt: skip
    assert figures["exchanges"] > 100 and not figures["diverged"]
    assert figures["conservation_error"] is None or figures["conservation_error"] < 1e-5
    alone = run(
        "algorithm.name=alone", "simulation.ranks=4", "simulation.dimension=64",
        "simulation.noise=1", "budget.samples=600",
    )  # fmt: skip
    assert figures["final_disagreement"] < 0.7 * alone["final_disagreement"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([BIPARTITE, "topology.graph=ring", "simulation.ranks=7"], ["odd circle", "even", "pair"]),
        ([BIPARTITE, "topology.graph=complete"], ["complete", "hypercube"]),
        (["algorithm.variant=bypartite"], ["bypartite", "pair, bipartite, pull"]),
        (["algorithm.name=allreduce", PULL], ["allreduce", "it has none"]),
        (["algorithm.local_steps_distribution=geometric"], ["local_steps_distribution", "swarm"]),
        (
            [PULL, "algorithm.local_steps_distribution=geometric"],
            ["local_steps_distribution", "swarm"],
        ),
    ],
)
def test_refusals_say_why_and_what_would_do(settings: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        run(*settings)
    assert [word for word in words if word not in str(refused.value)] == []


def test_every_variant_is_found_and_made_by_its_own_class_only(tmp_path: Path) -> None:
    for name, variants in algorithms.VARIANTS.items():
        assert algorithms.find(name) is variants[0] is algorithms.ALGORITHMS[name]
        for algorithm_cls in variants:
            assert algorithms.find(name, algorithm_cls.variant) is algorithm_cls
    with pytest.raises(UserError, match="ADPSGD is 'pair', got 'pull'"):
        ADPSGD.validate(2, AlgorithmConfig(variant="pull"), topology.build("complete", 2))
