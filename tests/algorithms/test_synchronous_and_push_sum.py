"""The baselines local_sgd, dpsgd, sgp, osgp: formulas, conservation, waiting, no deadlock."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import config, topology
from mpi_dasgd.algorithms import osgp, push_sum
from mpi_dasgd.algorithms.push_sum import UNIT_WEIGHT, PushSum, rotation
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator, simulate
from mpi_dasgd.transport.endpoint import SendBuffer
from mpi_dasgd.transport.inbox import Inbox, ReceivedMessage
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.network import Network
from tests.support.mpi_ranks import ROOT
from tests.support.random_delays import RandomDelays
from tests.support.rank_pool import run_pooled

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"
LEARN = ROOT / "tests" / "programs" / "baselines.py"
SLOW = "simulation.slow_ranks=[0]"
GRAPHS = ["ring", "torus", "exponential", "hypercube", "random_regular", "bipartite_exponential"]
SYNCHRONOUS = [
    ("local_sgd", "complete"), ("dpsgd", "ring"), ("dpsgd", "torus"), ("sgp", "exponential"),
    ("sgp", "complete"), ("sgp", "ring"),
]  # fmt: skip


def _settings(
    algorithm: str, graph: str, ranks: int, rounds: int, *overrides: str
) -> config.Config:
    degree = ["topology.degree=4"] if graph == "random_regular" else []
    return config.load(
        JOB,
        [
            f"algorithm.name={algorithm}", f"topology.graph={graph}", f"simulation.ranks={ranks}",
            f"budget.samples={rounds * ranks}", *degree, *overrides,
        ],
    )  # fmt: skip


def _run(algorithm: str, graph: str, ranks: int, rounds: int, *overrides: str) -> dict[str, Any]:
    return simulate(_settings(algorithm, graph, ranks, rounds, *overrides))


def _finished(simulation: Simulator, rounds: int) -> None:
    assert [local.local_step for local in simulation.locals] == [rounds] * simulation.size, (
        "deadlock"
    )


@pytest.mark.parametrize(("algorithm", "graph"), SYNCHRONOUS)
def test_effective_step_of_synchronous_baselines(algorithm: str, graph: str) -> None:
    figures = _run(algorithm, graph, 16, 100)
    assert figures["effective_step"] == pytest.approx(1, abs=1e-12)
    assert figures["conservation_error"] < 1e-12
    assert figures["waits"] > 0


@pytest.mark.parametrize("graph", ["complete", "ring", "torus"])
@pytest.mark.parametrize("overlap", [None, 2])
def test_effective_step_of_osgp(graph: str, overlap: int | None) -> None:
    if overlap is not None and graph == "torus":
        graph = "exponential"
    extra = [] if overlap is None else [f"algorithm.overlap_tau={overlap}"]
    figures = _run("osgp", graph, 16, 150, *extra)
    assert figures["effective_step"] == pytest.approx(1, abs=0.03)


def test_effective_step_of_osgp_with_a_straggler_differs_from_one_by_its_lag_alone() -> None:
    """Mass on a slow rank is old: that costs a share of the step that is proportional to eta."""
    lag = [
        1 - _run("osgp", "complete", 16, 200, SLOW, f"optimizer.lr={rate}")["effective_step"]
        for rate in (0.01, 0.001)
    ]
    assert 0 < lag[1] < 0.01
    assert lag[0] / lag[1] == pytest.approx(10, rel=0.25)


def _gradients(simulation: Simulator) -> Callable[[np.ndarray], np.ndarray]:
    """The gradients that the ranks of `simulation` will see, at given models."""
    seed, ranks = simulation.config.run.seed, range(simulation.size)
    noise = [np.random.default_rng([seed, rank, 5]) for rank in ranks]

    def at(models: np.ndarray) -> np.ndarray:
        return np.array([simulation.problem.gradient(i, models[i], noise[i]) for i in ranks])

    return at


def _agree(simulation: Simulator, expected: np.ndarray) -> None:
    error = np.abs(simulation.models - expected).max() / np.abs(expected).max()
    assert error < 1e-12


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("local_steps", [1, 3])
def test_dpsgd_is_the_formula_of_the_paper(graph: str, local_steps: int) -> None:
    """X <- W X - eta V, with momentum and weight decay in V, whatever the times of the ranks."""
    rate, momentum, decay, rounds, ranks = 0.05, 0.5, 0.1, 12, 8
    simulation = Simulator(
        _settings(
            "dpsgd", graph, ranks, rounds, "simulation.noise=1", "simulation.heterogeneity=2",
            f"optimizer.lr={rate}",
            f"optimizer.options={{momentum={momentum}, weight_decay={decay}}}",
            "simulation.compute_time=exponential", f"algorithm.local_steps={local_steps}", SLOW,
            "transport.publication_slots=3",
        ),
        _Slow,
    )  # fmt: skip
    gradients = _gradients(simulation)
    mixing = simulation.network.topology.mixing_matrix().toarray()
    models = simulation.models.copy()
    published, velocity = models.copy(), np.zeros_like(models)
    for step in range(1, rounds + 1):
        velocity = momentum * velocity + gradients(models) + decay * models
        models = models - rate * velocity
        if step % local_steps == 0:
            models = published = mixing @ published + models - published
    simulation.run()
    _finished(simulation, rounds)
    _agree(simulation, models)


@pytest.mark.parametrize("graph", [*GRAPHS, "complete"])
def test_dpsgd_contracts_by_the_spectral_gap(graph: str) -> None:
    """Without gradients models are W^k x_0, and the consensus distance falls by lambda_2^2."""
    rounds, square = (1, 2) if graph == "complete" else (40, 41), []
    for count in rounds:
        simulation = Simulator(_settings("dpsgd", graph, 16, count, "simulation.gradients=false"))
        first = simulation.models.copy()
        mixing = simulation.network.topology.mixing_matrix().toarray()
        simulation.run()
        _agree(simulation, np.linalg.matrix_power(mixing, count) @ first)
        square.append(np.square(simulation.models - simulation.models.mean(0)).sum())
        np.testing.assert_allclose(simulation.models.sum(0), first.sum(0), rtol=0, atol=1e-11)
    gap = topology.spectral_gap(simulation.network.topology)
    if graph == "complete":
        assert gap == pytest.approx(1) and square[0] < 1e-24
    else:
        assert square[1] / square[0] == pytest.approx((1 - gap) ** 2, rel=0.01)


@pytest.mark.parametrize("ranks", [8, 16])
def test_sgp_reaches_consensus_in_log_n_rounds(ranks: int) -> None:
    rounds = (ranks - 1).bit_length()
    for count in (rounds - 1, rounds):
        simulation = Simulator(
            _settings("sgp", "exponential", ranks, count, "simulation.gradients=false")
        )
        mean = simulation.models.mean(0)
        simulation.run()
        error = np.abs(simulation.models - mean).max()
        assert (error < 1e-14) == (count == rounds)


@pytest.mark.parametrize("graph", ["exponential", "complete", "ring"])
@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_sgp_is_the_formula_of_the_paper(graph: str, ranks: int) -> None:
    """X <- P_k (X - eta G), P_k column-stochastic, and w = P_k w, which stays 1."""
    rate, rounds = 0.05, 15
    simulation = Simulator(
        _settings(
            "sgp", graph, ranks, rounds, "simulation.noise=1", "simulation.heterogeneity=2",
            f"optimizer.lr={rate}", "simulation.compute_time=exponential", SLOW,
        ),
        _Counting,
    )  # fmt: skip
    gradients = _gradients(simulation)
    offsets = rotation(graph, ranks)
    assert offsets is not None
    models = simulation.models.copy()
    for step in range(rounds):
        sent = np.roll(np.eye(ranks), offsets[step % len(offsets)], axis=0)
        models = (np.eye(ranks) + sent) / 2 @ (models - rate * gradients(models))
    simulation.run()
    _finished(simulation, rounds)
    _agree(simulation, models)
    assert {_push_sum(a).weight_quanta for a in simulation.algorithms} == {UNIT_WEIGHT}


@pytest.mark.parametrize("local_steps", [1, 4])
def test_local_sgd_is_its_formula(local_steps: int) -> None:
    rate, rounds = 0.05, 12
    simulation = Simulator(
        _settings(
            "local_sgd", "complete", 5, rounds, "simulation.noise=1", f"optimizer.lr={rate}",
            f"algorithm.local_steps={local_steps}",
        )
    )  # fmt: skip
    gradients = _gradients(simulation)
    models = simulation.models.copy()
    for step in range(1, rounds + 1):
        models = models - rate * gradients(models)
        if step % local_steps == 0:
            models[:] = models.mean(0)
    simulation.run()
    _agree(simulation, models)
    if local_steps == 1:
        other = Simulator(
            _settings("allreduce", "complete", 5, rounds, "simulation.noise=1", "optimizer.lr=0.05")
        )
        other.run()
        _agree(other, models)


@pytest.mark.parametrize(("algorithm", "graph"), [*SYNCHRONOUS, ("osgp", "complete")])
def test_who_waits_for_a_straggler(algorithm: str, graph: str) -> None:
    """16 ranks, one 10 times slower: 16 / 10 gradients per time in lockstep, 15.1 without."""
    expected, rounds = (15.1, 250) if algorithm == "osgp" else (1.6, 40)
    figures = _run(
        algorithm,
        graph,
        16,
        rounds,
        SLOW,
        "simulation.compute_time=constant",
        "simulation.latency=0",
    )
    assert figures["gradients"] / figures["virtual_time"] == pytest.approx(expected, rel=0.05)


def _push_sum(algorithm: Any) -> PushSum:
    assert isinstance(algorithm, PushSum)
    return algorithm


class _CountingInbox(Inbox):
    """Counts the weight of the messages that were freed."""

    freed = 0

    def free(self, received: ReceivedMessage) -> None:
        self.freed += int(received.message.trailer[0])
        super().free(received)


class _Counting(VirtualEndpoint):
    """Messages take random times, and their weight is counted."""

    def __init__(self, network: Network, rank: int) -> None:
        delays = RandomDelays(random.Random(rank), mean=0.3, overtaking=True)
        super().__init__(network, rank, delays)
        memory = network.memory
        self.inbox = _CountingInbox(memory, memory, memory.word_map, rank, self.counters)
        self.sent = 0

    def send(self, buffer: SendBuffer) -> None:
        self.sent += int(buffer.message.trailer[0])
        super().send(buffer)


def _weight(simulation: Simulator) -> int:
    """Weights of all ranks and of all messages, wherever they are, in quanta."""
    total = 0
    for endpoint, algorithm in zip(simulation.endpoints, simulation.algorithms, strict=True):
        assert isinstance(endpoint, _Counting) and isinstance(endpoint.inbox, _CountingInbox)
        total += _push_sum(algorithm).weight_quanta + endpoint.sent - endpoint.inbox.freed
        early = getattr(algorithm, "_early", {})
        total += sum(int(message.trailer[0]) for message in early.values())
    return total


@pytest.mark.parametrize(
    ("algorithm", "ranks", "slots", "extra"),
    [
        ("sgp", 7, 1, []),
        ("sgp", 16, 2, []),
        ("osgp", 7, 1, []),
        ("osgp", 16, 4, []),
        ("osgp", 7, 1, ["algorithm.overlap_tau=1"]),
        ("osgp", 8, 2, ["algorithm.overlap_tau=5", "algorithm.local_steps=2"]),
    ],
)
def test_push_sum_weights_add_to_n_at_every_event(
    algorithm: str, ranks: int, slots: int, extra: list[str]
) -> None:
    simulation = Simulator(
        _settings(
            algorithm, "exponential", ranks, 60, "simulation.noise=1", SLOW,
            "simulation.compute_time=exponential", f"transport.inbox_slots={slots}", *extra,
        ),
        _Counting,
    )  # fmt: skip
    simulation.clock.advance = _after(simulation.clock.advance, simulation)  # type: ignore[method-assign]
    figures = simulation.run()
    assert figures["events"] > 500
    assert figures["conservation_error"] < 1e-13
    # drained: nothing is in flight any more
    assert sum(_push_sum(a).weight_quanta for a in simulation.algorithms) == ranks * UNIT_WEIGHT


def _after(advance: Callable[[], bool], simulation: Simulator) -> Callable[[], bool]:
    def checked() -> bool:
        happened = advance()
        assert _weight(simulation) == simulation.size * UNIT_WEIGHT
        return happened

    return checked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "graph", "ranks", "slots", "extra"),
    [
        ("dpsgd", "ring", 5, 4, []),
        ("dpsgd", "exponential", 6, 4, ["transport.publication_slots=3"]),
        ("sgp", "exponential", 8, 1, []),
        ("sgp", "exponential", 9, 1, []),
        ("sgp", "complete", 9, 2, []),
        ("sgp", "complete", 6, 3, ["algorithm.local_steps=2"]),
        ("sgp", "ring", 4, 4, []),
        ("osgp", "complete", 8, 1, ["algorithm.overlap_tau=1"]),
        ("osgp", "exponential", 7, 2, ["algorithm.overlap_tau=6"]),
    ],
)
def test_no_deadlock_in_ten_thousand_events(
    algorithm: str, graph: str, ranks: int, slots: int, extra: list[str]
) -> None:
    rounds = (5000 if "algorithm.local_steps=2" in extra else 3600) // ranks
    simulation = Simulator(
        _settings(
            algorithm, graph, ranks, rounds, "simulation.compute_time=exponential",
            "simulation.dimension=2", "simulation.noise=1", f"transport.inbox_slots={slots}",
            *extra,
        ),
        _Counting if algorithm != "dpsgd" else _Slow,
    )  # fmt: skip
    figures = simulation.run()
    _finished(simulation, rounds)
    assert figures["events"] >= 10_000
    assert figures["waits"] > 0
    assert figures["conservation_error"] < 1e-11


class _Slow(_Counting):
    """Messages without a trailer."""

    def send(self, buffer: SendBuffer) -> None:
        VirtualEndpoint.send(self, buffer)


def test_ranks_of_osgp_are_a_bounded_number_of_steps_apart() -> None:
    """A message of step k - tau is there, or step k does not end."""
    simulation = Simulator(
        _settings(
            "osgp", "ring", 4, 100, "algorithm.overlap_tau=3", SLOW, "simulation.slow_factor=50",
            "simulation.compute_time=exponential",
        )
    )  # fmt: skip
    lead = 0

    def watch(advance: Callable[[], bool]) -> Callable[[], bool]:
        def watched() -> bool:
            nonlocal lead
            happened = advance()
            steps = [local.local_step for local in simulation.locals]
            # step k of a rank: it has had the message of step k - 1 - tau of the rank before it
            ahead = [steps[i] - steps[i - 1] for i in range(4)]
            lead = max(lead, *ahead)
            return happened

        return watched

    simulation.clock.advance = watch(simulation.clock.advance)  # type: ignore[method-assign]
    simulation.run()
    _finished(simulation, 100)
    assert lead == 4


@pytest.mark.parametrize("compute", ["constant", "lognormal", "exponential"])
@pytest.mark.parametrize("network", ["latency=0", "latency=0.5", "bandwidth=400"])
def test_osgp_never_yields(compute: str, network: str) -> None:
    figures = _run(
        "osgp", "complete", 9, 150, f"simulation.compute_time={compute}", f"simulation.{network}",
        SLOW,
        "transport.inbox_slots=2",
    )  # fmt: skip
    assert figures["waits"] == 0
    assert figures["exchanges"] > 300
    assert figures["conservation_error"] < 1e-13


def _worst(floor: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(push_sum, "MIN_WEIGHT", floor)
    monkeypatch.setattr(osgp, "MIN_WEIGHT", floor)
    with np.errstate(all="ignore"):
        return [
            _run(
                "osgp", "complete", ranks, 250, SLOW, "simulation.noise=1", "optimizer.lr=0.3"
            )
            for ranks in (4, 16)
        ]  # fmt: skip


@pytest.mark.slow
def test_osgp_with_a_straggler_is_stable_and_without_a_floor_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for figures in _worst(push_sum.MIN_WEIGHT, monkeypatch):
        assert figures["max_disagreement"] < 100
        assert figures["final_distance"] < 5
    assert all(figures["diverged"] for figures in _worst(0, monkeypatch))


@pytest.mark.parametrize(
    ("algorithm", "graph", "extra"),
    [
        ("local_sgd", "complete", ["algorithm.local_steps=5"]),
        ("dpsgd", "ring", []),
        ("dpsgd", "torus", ["algorithm.local_steps=3"]),
        ("dpsgd", "ring", ["algorithm.local_steps=5"]),  # in the middle of a phase
        ("sgp", "exponential", []),
        ("sgp", "complete", ["algorithm.local_steps=2"]),
    ],
)
def test_synchronous_baselines_resume_bit_for_bit(
    algorithm: str, graph: str, extra: list[str]
) -> None:
    def make(rounds: int) -> Simulator:
        return Simulator(_settings(algorithm, graph, 6, rounds, "simulation.condition=9", *extra))

    half, rounds = 12, 20
    whole, first, second = make(rounds), make(half), make(rounds)
    whole.run()
    first.run()
    second.models[:] = first.models
    for one, other, local in zip(first.algorithms, second.algorithms, second.locals, strict=True):
        local.local_step = half
        other.start()
        other.load_state(one.state())
        other.restart(half)
    for rank in range(6):
        second._start_gradient(rank)
    while second.clock.advance():
        pass
    _finished(second, rounds)
    np.testing.assert_array_equal(second.models, whole.models)


@pytest.mark.parametrize("extra", [[], ["algorithm.overlap_tau=3"]])
def test_osgp_resumes_with_the_whole_mass(extra: list[str]) -> None:
    """Messages in flight are lost; weights restart with sum n; no rank waits for the lost."""
    settings = _settings("osgp", "exponential", 6, 20, "simulation.latency=0.7", *extra)
    first, second = Simulator(settings), Simulator(settings)
    for algorithm in first.algorithms:
        algorithm.start()
    for rank in range(6):
        first._start_gradient(rank)
    while first.gradients < 60:
        first.clock.advance()
    assert sum(_push_sum(a).weight_quanta for a in first.algorithms) < 6 * UNIT_WEIGHT
    second.models[:] = first.models
    for one, other, local in zip(first.algorithms, second.algorithms, second.locals, strict=True):
        local.local_step = 10
        other.start()
        other.load_state(one.state())
        other.restart(10)
    np.testing.assert_array_equal(second.models, first.models)
    for rank in range(6):
        second._start_gradient(rank)
    while second.clock.advance():
        pass
    second.drain()
    assert sum(_push_sum(a).weight_quanta for a in second.algorithms) == 6 * UNIT_WEIGHT
    if extra:
        _finished(second, 20)


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (4, ["algorithm.name=sgp", "topology.graph=torus"], "topology.graph.*exponential"),
        (
            4,
            ["algorithm.name=osgp", "algorithm.overlap_tau=1", "topology.graph=torus"],
            "exponential",
        ),
        (1, ["algorithm.name=sgp"], "at least 2 ranks"),
        (4, ["algorithm.name=dpsgd", "codec.name=lattice8"], "codec.name.*dpsgd.*none"),
        (
            4,
            ["algorithm.name=sgp", "algorithm.delay_adaptive_rule=inverse"],
            "delay_adaptive_rule.*sgp",
        ),
        (
            4,
            [
                "algorithm.name=osgp",
                "algorithm.overlap_tau=1",
                "algorithm.delay_adaptive_rule=inverse",
            ],
            "delay_adaptive_rule.*osgp",
        ),
    ],
)
def test_what_does_not_fit_is_refused(ranks: int, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        simulate(config.load(JOB, [f"simulation.ranks={ranks}", *overrides]))


def test_rotations() -> None:
    assert [list(rotation("exponential", n) or ()) for n in (2, 3, 5, 8)] == [
        [1], [1, 2], [1, 2, 4], [1, 2, 4],
    ]  # fmt: skip
    assert list(rotation("complete", 4) or ()) == [1, 2, 3]
    assert rotation("torus", 4) is None
    for name in ("exponential", "complete", "ring"):
        graph = topology.build(name, 6)
        assert set(rotation(name, 6) or ()) <= set(graph.neighbours(0)), "off the graph"


@pytest.mark.mpi
def test_baselines_learn_on_real_windows() -> None:
    """One job of 4 ranks, so that what takes longest, the import, is done once."""
    runs = {
        "dpsgd": ["topology.graph=ring", "budget.samples=8000"],
        "sgp": ["topology.graph=exponential", "budget.samples=8000"],
        "osgp": ["budget.samples=8000"],
        "osgp overlapped": [
            "topology.graph=ring",
            "budget.samples=4000",
            "algorithm.overlap_tau=2",
        ],
        "local_sgd": ["budget.samples=4000", "algorithm.local_steps=4"],
        "sgp straggler": ["topology.graph=ring", "budget.samples=2000"],
        "dpsgd remote": ["topology.graph=ring", "budget.samples=2000", "transport.mode=rma"],
        "sgp remote": ["budget.samples=2000", "transport.mode=rma", "transport.inbox_slots=1"],
        "osgp remote": ["budget.samples=2000", "transport.mode=rma"],
    }
    done = run_pooled(4, LEARN, json.dumps(runs), timeout=150)
    reports = json.loads(done.stdout)
    assert list(reports) == list(runs)
    for name, report in reports.items():
        budget = next(int(o.split("=")[1]) for o in runs[name] if o.startswith("budget"))
        assert report["accuracy"] > {8000: 0.85, 4000: 0.8, 2000: 0.5}[budget], (name, report)
        assert report["messages"] == report["absorbed"], name
        if name in ("osgp", "osgp remote"):
            assert sum(report["steps"]) >= budget / 32
        else:
            assert report["steps"] == [-(-budget // 128)] * 4, name
        if name.split()[0] in ("sgp", "osgp"):
            assert report["quanta"] == 4 * UNIT_WEIGHT, name
            # An asynchronous rank sends what its progress thread has time for.
            assert report["messages"] > (0 if name == "osgp remote" else 20), (name, report)
        assert report["path"] == ("Get and Put" if "remote" in name else "in place")
