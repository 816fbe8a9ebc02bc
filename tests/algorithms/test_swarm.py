"""SwarmSGD in its three variants; the waiting ones, also AD-PSGD's bipartite, on windows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import codecs, config
from mpi_dasgd.algorithms.local_phase import Phases
from mpi_dasgd.config.schema import AlgorithmConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.transport.control_words import HEAD
from tests.support.mpi_ranks import ROOT, rank_counts, run_ranks
from tests.support.rank_pool import run_pooled
from tests.support.virtual_ranks import JOB, Fixed, Ranks, effective_step, run

SWARM = "algorithm.name=swarm"
BLOCKING = "algorithm.variant=blocking"
PULL = "algorithm.variant=pull"
FOUR, GEOMETRIC = "algorithm.local_steps=4", "algorithm.local_steps_distribution=geometric"
SLOW = "simulation.slow_ranks=[0]"
PROGRAMS = ROOT / "tests" / "programs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (),
        (FOUR,),
        (FOUR, GEOMETRIC),
        (FOUR, GEOMETRIC, "simulation.latency=0.7"),
        (FOUR, "topology.graph=random_regular", "topology.degree=3"),
        (BLOCKING,),
        (BLOCKING, FOUR),
        (BLOCKING, FOUR, GEOMETRIC),
    ],
    ids=lambda settings: " ".join(settings) or "default",
)
def test_local_phases_have_the_effective_step_one(settings: tuple[str, ...]) -> None:
    small = SWARM, "simulation.ranks=8", "budget.samples=2000"
    assert effective_step(*small, *settings) == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "documented"), [(1, 0.67), (4, 0.865)])
def test_effective_step_of_pull_is_as_documented(steps: int, documented: float) -> None:
    """On Poisson clocks: 2/3 at H = 1, as publications lack the average that came after them."""
    found = effective_step(
        SWARM, PULL, f"algorithm.local_steps={steps}", "simulation.compute_time=exponential",
        "simulation.latency=0", "optimizer.lr=0.002", "budget.samples=6000",
    )  # fmt: skip
    assert found == pytest.approx(documented, abs=0.03)


def test_one_local_step_without_blocking_is_adpsgd_that_averages_first() -> None:
    settings = "simulation.noise=1", "budget.samples=800"
    swarm, pair = (run(name, *settings) for name in (SWARM, "algorithm.order=adapt_with_combine"))
    for figure in ("final_disagreement", "final_distance", "excess_loss"):
        assert swarm[figure] == pytest.approx(pair[figure], rel=1e-9)


def test_phases_have_their_length() -> None:
    fixed = Phases(AlgorithmConfig(local_steps=3), random.Random(1))
    assert [step for step in range(1, 10) if fixed.ends(step)] == [3, 6, 9]
    distribution = AlgorithmConfig(local_steps=4, local_steps_distribution="geometric")
    geometric = Phases(distribution, random.Random(1))
    ends = [step for step in range(1, 40_001) if geometric.ends(step)]
    lengths = np.diff([0, *ends])
    assert lengths.mean() == pytest.approx(4, rel=0.02)
    assert lengths.var() == pytest.approx(4 * 3, rel=0.1)  # (1 - p) / p^2
    assert (lengths == 1).mean() == pytest.approx(1 / 4, rel=0.05)


def test_a_phase_by_hand() -> None:
    """Y_0, Y_1 <- A = (Y_0 + Y_1)/2, then Y_0 <- A - a_0; rank 1 goes on from its own base."""
    models = np.array([[0.0], [8.0]])
    ranks = Ranks(models, AlgorithmConfig(name="swarm", local_steps=2))
    ranks.locals[1].gradient[:] = 10
    for algorithm in ranks.algorithms:
        algorithm.rng = Fixed(1)  # type: ignore[assignment]
    ranks.step(1)
    assert models[1] == -2
    ranks.step(0)
    ranks.step(0)  # a_0 = 2, A = 4
    assert models[0] == 2
    np.testing.assert_array_equal(ranks.now(), [[2.0], [4.0 - 10.0]])  # Y_1 = A; a_1 = 10 so far
    assert models[1] == -2  # x_1 does not see the average
    ranks.step(1)  # a_1 = 20; rank 1 absorbs, averages Y_1 = 4 with Y_0 = 2, and subtracts
    assert models[1] == 3 - 20
    np.testing.assert_array_equal(ranks.now(), [[3.0], [3.0 - 20.0]])
    ranks.algorithms[0].absorb(2)
    assert models[0] == 3  # no local update yet: the phase starts again from the live vector


@pytest.mark.parametrize("settings", [(), (FOUR,), (FOUR, GEOMETRIC), (PULL,), (PULL, FOUR)])
@pytest.mark.parametrize("latency", [0, 0.5])
def test_nonblocking_and_pull_never_wait(settings: tuple[str, ...], latency: float) -> None:
    figures = run(SWARM, *settings, f"simulation.latency={latency}", SLOW, "budget.samples=1000")
    assert figures["waits"] == 0
    assert figures["exchanges"] > (130 if FOUR in settings else 400)


@pytest.mark.parametrize(
    "settings", [(), (FOUR,), (FOUR, GEOMETRIC), (BLOCKING,), (BLOCKING, FOUR, GEOMETRIC)]
)
@pytest.mark.parametrize("latency", [0, 0.3])
def test_the_sum_is_conserved_and_all_of_it_comes_home(
    settings: tuple[str, ...], latency: float
) -> None:
    simulation = Simulator(
        config.load(
            JOB,
            [
                SWARM, f"simulation.latency={latency}", "simulation.compute_time=exponential", SLOW,
                "simulation.ranks=5", "simulation.noise=1", "budget.samples=600", *settings,
            ],
        )
    )  # fmt: skip
    figures: Any = simulation.run()
    assert figures["exchanges"] > 50
    assert figures["conservation_error"] < 1e-12
    # drained: the models have all local updates, and nothing is in flight any more
    np.testing.assert_allclose(simulation.models.sum(0), simulation.oracle.expected_sum, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["exponential", "constant"])
@pytest.mark.parametrize(
    ("ranks", "graph", "latency"),
    [
        (2, "complete", 0.05),
        (3, "complete", 1.0),
        (7, "complete", 0.05),
        (7, "ring", 0.05),
        (8, "complete", 0),
        (8, "ring", 1.0),
    ],
)
def test_blocking_does_not_deadlock(ranks: int, graph: str, latency: float, compute: str) -> None:
    """Together with those of bipartite these are 10^5 events."""
    simulation = Simulator(
        config.load(
            JOB,
            [
                SWARM, BLOCKING, f"topology.graph={graph}", f"simulation.ranks={ranks}",
                f"simulation.latency={latency}", f"simulation.compute_time={compute}",
                "optimizer.lr=0.001", "budget.samples=1000", "simulation.dimension=2",
            ],
        )
    )  # fmt: skip
    figures: Any = simulation.run()
    assert figures["gradients"] == 1000  # else the clock has run out of events: all wait
    assert figures["waits"] >= 480
    assert figures["skipped"] == 0
    assert min(local.local_step for local in simulation.locals) > 0.7 * 1000 / ranks


def test_both_sides_of_blocking_end_at_the_same_mean() -> None:
    models = np.array([[0.0, 8.0], [4.0, 2.0]])
    ranks = Ranks(models, AlgorithmConfig(name="swarm", variant="blocking"))
    for local in ranks.locals:
        local.gradient[:] = 0
    assert not ranks.step(0)  # offers, and waits
    assert ranks.step(1)
    np.testing.assert_array_equal(models[1], [2.0, 5.0])
    ranks.algorithms[0]._pairs.absorb(models[0], 1)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(models[0], [2.0, 5.0])


def test_who_has_finished_meets_those_who_have_not() -> None:
    models = np.array([[0.0], [4.0]])
    ranks = Ranks(models, AlgorithmConfig(name="swarm", variant="blocking"))
    for local in ranks.locals:
        local.gradient[:] = 0
    ranks.locals[0].local_step = 1
    waiting = ranks.algorithms[0].step(ranks.locals[0])
    pending = next(iter(waiting))
    assert not pending.test()
    finished = ranks.algorithms[1]
    finished.absorb(0)
    assert not pending.test()  # it still trains: it has no reason to poll
    assert list(finished.finalize()) == []
    finished.absorb(0)
    assert pending.test() and finished.is_drained
    assert list(waiting) == []
    assert (models == 2).all()


def test_a_rank_whose_neighbours_have_all_died_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(np.zeros((2, 1)), AlgorithmConfig(name="swarm", variant="blocking"))
    algorithm = ranks.algorithms[0]
    ranks.locals[0].local_step = 1
    waiting = algorithm.step(ranks.locals[0])
    pending = next(iter(waiting))
    monkeypatch.setattr(algorithm.endpoint, "neighbours", lambda: ())
    assert pending.test()
    assert list(waiting) == []
    assert ranks.records[-1].partner == -1


def test_a_checkpoint_in_the_middle_of_a_phase_holds_all() -> None:
    settings = AlgorithmConfig(name="swarm", local_steps=3)
    ranks = Ranks(np.arange(6.0).reshape(3, 2), settings)
    for rank in (0, 1, 2, 0, 1, 2, 1, 0, 2, 0):
        ranks.step(rank)
    ranks.algorithms[0].absorb(4)
    before = ranks.algorithms[0]
    saved = {name: array.copy() for name, array in before.state().items()}
    assert saved["steps"] == 1 and (saved["base"] != ranks.models[0]).all()
    again = Ranks(ranks.models.copy(), settings)
    again.algorithms[0].load_state(saved)
    again.algorithms[0].restart(4)
    np.testing.assert_array_equal(again.algorithms[0].mass(), before.mass())
    publication = again.memory.view(0, again.memory.read(0, HEAD) & 0xFF)
    np.testing.assert_array_equal(publication.payload, saved["live"])


@pytest.mark.parametrize("codec", sorted(set(codecs.CODECS) - {"none"}))
@pytest.mark.parametrize("variant", ["nonblocking", "blocking", "pull"])
def test_every_codec(codec: str, variant: str) -> None:
    figures = run(
        SWARM, f"algorithm.variant={variant}", f"codec.name={codec}", "simulation.ranks=4",
        "simulation.dtype=float32", "simulation.dimension=64", "budget.samples=400",
        "algorithm.local_steps=2",
    )  # fmt: skip
    assert figures["exchanges"] > 50 and not figures["diverged"]
    if variant != "pull":
        assert figures["conservation_error"] < 1e-5
        assert figures["effective_step"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("variant", ["nonblocking", "blocking", "pull"])
def test_an_order_is_refused(variant: str) -> None:
    with pytest.raises(
        UserError,
        match=f"algorithm.order: 'swarm {variant}' .* has no use for it, got 'adapt_then_combine'",
    ):
        run(SWARM, f"algorithm.variant={variant}", "algorithm.order=adapt_then_combine")


# On real windows: what waits must not hang, lose a delta, or wait for the dead.


@pytest.mark.mpi
def test_waiting_variants_on_windows_balance_and_survive_a_death() -> None:
    (n,) = rank_counts(4)
    done = run_ranks(n, PROGRAMS / "waiting.py", "60", "60", timeout=100, check=False)
    assert done.codes == [0] * (n - 1) + [137], done.report()  # the last one is killed
    reports = json.loads(done.stdout)
    assert len(reports) == 6
    for name, report in reports.items():
        if name.endswith("a death"):
            assert report["dead"] == [n - 1]
            assert report["with others"] > 5
        else:
            assert report["steps"] == [60] * n
            assert report["exchanges"] >= 30 * n - n
            assert report["apart"] > 0.1, "the models agree: a lost delta would not be seen"
            assert report["error"] < 1e-4


@pytest.mark.mpi
def test_waiting_variants_learn_the_digits_on_windows(tmp_path: Path) -> None:
    edges = tmp_path / "edges.txt"
    edges.write_text("0 1\n1 2\n")
    done = run_pooled(
        3, PROGRAMS / "learning.py", "adpsgd", "bipartite", str(edges), "swarm", "blocking",
        "complete", timeout=150,
    )  # fmt: skip
    for variant, report in json.loads(done.stdout).items():
        assert report["accuracy"] > 0.85, variant
        assert min(report["steps"]) > 40, variant
