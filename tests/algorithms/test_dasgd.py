"""DASGD: every gradient in every replica exactly once, bit for bit; version vectors."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mpi_dasgd import codecs, config, topology
from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.algorithms.dasgd import DASGD
from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.analysis.version_history import history
from mpi_dasgd.codecs.error_feedback import GRID_STEP, round_to_grid, update_quantizer
from mpi_dasgd.config.schema import AlgorithmConfig, CodecConfig
from mpi_dasgd.errors import Diverged, UserError
from mpi_dasgd.simulation import simulator
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.staleness.version_vectors import SetStaleness
from mpi_dasgd.storage.results import Results
from mpi_dasgd.transport.endpoint import SendBuffer
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from tests.support.training import train
from tests.support.virtual_ranks import Ranks

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"
ROUGH = ("simulation.latency=0.7", "transport.inbox_slots=1", "simulation.slow_ranks=[0]")


class Watched(Simulator):
    """A simulation that sums all updates as integers, and says when a rank has ended a step."""

    def __init__(self, *overrides: str, endpoint: Any = VirtualEndpoint) -> None:
        super().__init__(config.load(JOB, ["algorithm.name=dasgd", *overrides]), endpoint)
        self.updates = _integers(round_to_grid(self.models[0].astype(np.float64)))
        for rank, local in enumerate(self.locals):
            local.apply = self._watch(rank, local.apply)  # type: ignore[method-assign]

    def _watch(self, rank: int, update: Any) -> Any:
        def watched(factor: float = 1.0) -> None:
            before = self.models[rank].astype(np.float64)
            update(factor)
            change = self.models[rank].astype(np.float64) - before
            self.updates += _integers(round_to_grid(change))

        return watched

    def _start_gradient(self, rank: int) -> None:
        if self.locals[rank].local_step:
            self.ended(rank)
        super()._start_gradient(rank)

    def ended(self, rank: int) -> None:
        """A step of `rank` is over, and its next gradient begins."""

    def check_agreement(self) -> None:
        """At the end every replica is the start plus all updates, exactly, and knows it."""
        expected = (self.updates * GRID_STEP).astype(self.models.dtype)
        for algorithm, model in zip(self.algorithms, self.models, strict=True):
            assert algorithm.is_drained
            assert algorithm.versions.tolist() == self.network.gradient_counts
            np.testing.assert_array_equal(model, expected)


def _integers(on_grid: np.ndarray) -> np.ndarray:
    return np.rint(on_grid / GRID_STEP).astype(np.int64)


@pytest.mark.parametrize(
    ("graph", "ranks"),
    [(graph, n) for graph in ("complete", "ring", "exponential") for n in (2, 3, 5, 8)]
    + [("torus", 6), ("torus", 8)],
)
def test_all_replicas_agree_bit_for_bit_and_hold_all_updates(graph: str, ranks: int) -> None:
    common = (
        f"topology.graph={graph}", f"simulation.ranks={ranks}", f"budget.samples={40 * ranks}",
        "simulation.noise=1", "simulation.compute_time=exponential",
        "optimizer.options={momentum=0.5}",
    )  # fmt: skip
    smooth, rough = Watched(*common), Watched(*common, *ROUGH)
    for simulation in (smooth, rough):
        figures = simulation.run()
        assert figures["waits"] == 0
        assert figures["drained_disagreement"] == 0
        simulation.check_agreement()
    if ranks > 2:
        # full inboxes: what found a full inbox was sent later, in fewer messages
        assert sum(e.counters.inbox_full for e in rough.endpoints) > 0
        sent = [sum(e.counters.messages for e in s.endpoints) for s in (rough, smooth)]
        assert sent[0] < sent[1]


@pytest.mark.parametrize("relay", ["direct", "tree"])
@pytest.mark.parametrize("codec", ["none", "bf16", "qsgd8"])
def test_float32_models_agree_bit_for_bit_with_each_codec(codec: str, relay: str) -> None:
    simulation = Watched(
        f"codec.name={codec}", f"algorithm.relay={relay}", "simulation.dtype=float32",
        "simulation.ranks=4", "simulation.dimension=1500", "simulation.noise=1",
        "budget.samples=160", *ROUGH,
    )  # fmt: skip
    figures = simulation.run()
    assert figures["drained_disagreement"] == 0 and figures["final_disagreement"] > 0
    simulation.check_agreement()
    # what the codes could not say at once took a few messages more, not many
    assert sum(e.counters.messages for e in simulation.endpoints) < 160 * 3 + 12 * 10


class Tagged(Watched):
    """Gradient number g adds 1 to coordinate g: a replica shows which gradients are in it."""

    def __init__(self, *overrides: str) -> None:
        super().__init__(
            "optimizer.lr=1", "budget.samples=300", "simulation.dimension=300",
            "simulation.compute_time=exponential", *overrides,
        )  # fmt: skip
        self.models[:] = 0
        self._effective_step = lambda mean: None  # type: ignore[method-assign]
        self.problem.gradient = self._tag  # type: ignore[method-assign]
        self.compared = self.differing = 0

    def _tag(self, rank: int, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        tag = np.zeros_like(x)
        tag[self.gradients - 1] = -1
        return tag

    def ended(self, rank: int) -> None:
        if self.gradients % 7:
            return
        assert set(np.unique(self.models)) <= {0.0, 1.0}  # none is applied twice
        for i, j in combinations(range(self.size), 2):
            difference = int((self.models[i] != self.models[j]).sum())  # |G_i ^ G_j|
            one, other = (self.algorithms[k].versions for k in (i, j))
            assert np.abs(one - other).sum() == difference
            self.compared += 1
            self.differing += difference > 0


@pytest.mark.parametrize("network", [(), ROUGH], ids=["smooth", "rough"])
@pytest.mark.parametrize("graph", ["complete", "ring", "torus"])
def test_version_vectors_count_the_symmetric_difference_of_gradient_sets(
    graph: str, network: tuple[str, ...]
) -> None:
    simulation = Tagged(f"topology.graph={graph}", "simulation.ranks=6", *network)
    simulation.run()
    assert simulation.compared > 500 and simulation.differing > 0.5 * simulation.compared
    assert (simulation.models == 1).all()  # every gradient has reached every replica


@pytest.mark.slow
def test_it_never_waits_in_ten_thousand_events() -> None:
    figures = Watched(
        "simulation.ranks=7", "simulation.compute_time=lognormal", "simulation.slow_ranks=[3]",
        "simulation.latency=0.3", "budget.samples=1900", "transport.inbox_slots=8",
        "optimizer.lr=1e-3",
    ).run()  # fmt: skip
    assert figures["events"] >= 10_000
    assert figures["waits"] == 0


@pytest.mark.parametrize("graph", ["complete", "ring"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_every_gradient_moves_the_mean_n_times_as_far(ranks: int, graph: str) -> None:
    simulation = Watched(
        f"simulation.ranks={ranks}", f"topology.graph={graph}", "optimizer.lr=1e-4",
        "budget.samples=600",
    )  # fmt: skip
    assert simulation.run()["effective_step"] == pytest.approx(ranks, rel=0.02)


class Threaded(VirtualEndpoint):
    """Links of exponential latency without overtaking; messages are applied on arrival."""

    rng: ClassVar[np.random.Generator]
    latency: ClassVar[float]
    ranks: ClassVar[list[DASGD]]

    def send(self, buffer: SendBuffer) -> None:
        clock, link = self._network.clock, vars(self).setdefault("arrival_times", {})
        at = max(link.get(buffer.rank, 0), clock.now + self.rng.exponential(self.latency))
        link[buffer.rank] = at
        self._in_flight += 1

        def arrive() -> None:
            self._in_flight -= 1
            assert buffer.reservation is not None
            self.inbox.send(buffer.reservation, buffer.message)
            self.ranks[buffer.rank].absorb(0)

        clock.after(at - clock.now, arrive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "latency", "expected"),
    [(4, 0.1, 1.4), (4, 0.5, 3.3), (4, 1.0, 6.1), (16, 0.1, 2.65), (16, 0.5, 9.9)],
)
def test_staleness_of_the_independent_simulation(
    ranks: int, latency: float, expected: float
) -> None:
    # seeds, 5.3: exponential compute time of mean 1, messages applied at once
    Threaded.rng, Threaded.latency = np.random.default_rng(1), latency
    simulation = Watched(
        f"simulation.ranks={ranks}", "simulation.compute_time=exponential",
        "simulation.dimension=1",
        "transport.inbox_slots=64", "optimizer.lr=1e-4",
        f"budget.samples={1000 if ranks == 4 else 300}",
        endpoint=Threaded,
    )  # fmt: skip
    Threaded.ranks = simulation.algorithms  # type: ignore[assignment]
    assert simulation.run()["set_staleness_mean"] == pytest.approx(expected, rel=0.12)


class Recorded(Watched):
    """Keeps the tables that a run on windows leaves."""

    def __init__(self, *overrides: str) -> None:
        super().__init__("simulation.compute_time=exponential", *overrides)
        self.rows: list[dict[str, list[tuple[float, ...]]]] = [
            {"train": [], "exchange": []} for _ in range(self.size)
        ]
        self.applied: list[
            tuple[int, int, int, int]
        ] = []  # steps of all so far, rank, source, version
        for rank, algorithm in enumerate(self.algorithms):
            algorithm.records.record = lambda exchange, rank=rank: self._exchange(rank, exchange)

    def _exchange(self, rank: int, exchange: ExchangeRecord) -> None:
        source, version = exchange.partner, exchange.partner_step
        row = (exchange.step, self.clock.now, source, exchange.kind, version)
        self.rows[rank]["exchange"].append(row)
        self.applied.append((self.gradients, rank, source, version))

    def ended(self, rank: int) -> None:
        self.rows[rank]["train"].append((self.locals[rank].local_step, self.clock.now))

    @property
    def results(self) -> Results:
        names = {
            "train": ("step", "time_s"),
            "exchange": ("step", "time_s", "partner", "kind", "partner_step"),
        }
        records, tables = {}, {}
        for table, columns in names.items():
            parts = [np.array(rows[table]) for rows in self.rows]
            records[table] = np.array([len(part) for part in parts])
            padded = np.full((self.size, max(records[table]), len(columns)), -1.0)
            for row, part in zip(padded, parts, strict=True):
                row[: len(part)] = part
            tables[table] = {
                name: padded[..., i] if name == "time_s" else padded[..., i].astype(np.int64)
                for i, name in enumerate(columns)
            }
        return Results({"world_size": self.size}, np.arange(self.size), records, tables, {})


@pytest.mark.parametrize("graph", ["complete", "ring"])
def test_the_version_vectors_are_rebuilt_from_the_results(
    graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: list[int] = []

    class Meter(SetStaleness):
        def update(self, rank: int) -> tuple[np.ndarray, int]:
            staleness, lacking = super().update(rank)
            missing.append(lacking)
            return staleness, lacking

    monkeypatch.setattr(simulator, "SetStaleness", Meter)
    simulation = Recorded(
        f"topology.graph={graph}", "simulation.ranks=5", "budget.samples=400", *ROUGH
    )
    figures = simulation.run()
    found = history(simulation.results)
    assert found.average == pytest.approx(figures["set_staleness_mean"], rel=1e-12)
    assert found.average == pytest.approx(found.mean.mean(), rel=1e-12)
    assert found.maximum == found.largest.max() == figures["set_staleness_max"]
    assert sorted(found.missing) == sorted(missing)
    # the propagation of each gradient, one by one
    own = [
        (rank, s)
        for rank in range(5)
        for s in range(1, simulation.network.gradient_counts[rank] + 1)
    ]
    order = sorted(
        (time, rank, int(step))
        for rank, rows in enumerate(simulation.rows)
        for step, time in rows["train"]
    )
    issued = {(rank, step): number for number, (_, rank, step) in enumerate(order, 1)}
    expected = []
    for source, s in own:
        last = max(
            next(g for g, i, k, v in simulation.applied if (i, k) == (rank, source) and v >= s)
            for rank in range(5)
            if rank != source
        )
        expected.append(last - issued[source, s])
    np.testing.assert_array_equal(found.propagation, expected)


@pytest.mark.parametrize("codec", ["none", "bf16", "qsgd8"])
def test_codes_and_what_they_leave_add_up_exactly(codec: str) -> None:
    elements = 2500  # no whole bucket at the end
    made = codecs.make(
        CodecConfig(name=codec), elements, np.dtype(np.float32), seed=0, rank=0
    )  # fmt: skip
    code, rng = update_quantizer(made), np.random.default_rng(3)
    message = codecs.Message(np.zeros(made.layout.nbytes, np.uint8), made.layout)
    size = np.geomspace(1e-12, 4, elements)  # a whole bucket of small ones, too
    update = round_to_grid(size * rng.normal(size=elements))
    update[::5] = 0
    residual, sent, messages, remains = update.copy(), np.zeros(elements), 0, True
    while remains:
        before = residual.copy()
        remains = code.pack(residual, message)
        sent += code.read(message, slice(0, elements))
        np.testing.assert_array_equal(sent + residual, update)
        assert not residual[::5].any()
        shrunk = np.abs(before).max() / {"none": 2**24, "bf16": 2**8, "qsgd8": 254}[codec]
        assert np.abs(residual).max() <= shrunk + GRID_STEP / 2
        messages += 1
    np.testing.assert_array_equal(sent, update)
    assert messages <= {"none": 2, "bf16": 6, "qsgd8": 6}[codec]


@pytest.mark.parametrize(("graph", "ranks"), [("ring", 9), ("torus", 12), ("complete", 5)])
def test_branches_make_one_spanning_tree(graph: str, ranks: int) -> None:
    built = topology.build(graph, ranks)
    branches = [topology.tree_branches(built, rank) for rank in range(ranks)]
    for rank, near in enumerate(branches):
        assert set(near) <= set(built.neighbours(rank))
        assert all(rank in branches[other] for other in near)
        assert sum(near.values()) == ranks - 1
        assert all(size + branches[other][rank] == ranks for other, size in near.items())
    assert sum(map(len, branches)) == 2 * (ranks - 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.local_steps=2"], ["local_steps", "every gradient", "got 2"]),
        (["algorithm.relay=direct", "topology.graph=ring"], ["relay", "ring", "relay=tree"]),
        (["codec.name=lattice8"], ["codec.name", "lattice8", "updates", "qsgd8"]),
        (["codec.name=fp16"], ["codec.name", "fp16", "bf16"]),
        (["codec.name=qsgd8"], ["float32", "float64"]),
        (["simulation.ranks=1"], ["at least 2 ranks"]),
    ],
)
def test_settings_that_dasgd_cannot_follow_are_refused(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        Watched(*overrides)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_model_that_is_not_finite_or_too_large_is_noticed_at_the_end() -> None:
    simulation = Watched("simulation.ranks=2", "budget.samples=10")
    simulation.run()
    replica = simulation.algorithms[0]._replica  # type: ignore[attr-defined]
    replica.replace(np.full(8, 5000.0))
    with pytest.warns(UserWarning, match="5000; from 4096 on"):
        list(simulation.algorithms[0].finalize())
    replica.replace(np.full(8, np.nan))
    with pytest.raises(Diverged, match=r"rank 0.*optimizer\.lr"):
        list(simulation.algorithms[0].finalize())


class Resumed(Watched):
    """Goes on from what each rank of another simulation saved at its tenth step."""

    def __init__(self, saved: Saved, *overrides: str) -> None:
        super().__init__(*overrides)
        self.saved = saved.states
        for rank, algorithm in enumerate(self.algorithms):
            algorithm.start = lambda rank=rank, start=algorithm.start: self._start(rank, start)

    def _start(self, rank: int, start: Any) -> None:
        start()
        state = self.saved[rank]
        self.models[rank] = state.pop("model")
        self.locals[rank].local_step = 10
        self.algorithms[rank].load_state(state)
        self.algorithms[rank].restart(10)


class Saved(Watched):
    def __init__(self, *overrides: str) -> None:
        super().__init__(*overrides)
        self.states: dict[int, dict[str, np.ndarray]] = {}

    def ended(self, rank: int) -> None:
        if self.locals[rank].local_step == 10:
            algorithm = self.algorithms[rank]
            algorithm.absorb(10)
            arrays = {**algorithm.state(), "model": self.models[rank]}
            self.states[rank] = {name: array.copy() for name, array in arrays.items()}


@pytest.mark.parametrize("graph", ["complete", "ring"])
def test_a_resumed_run_begins_with_the_mean_and_agrees_again(graph: str) -> None:
    settings = (
        f"topology.graph={graph}", "simulation.ranks=4", "budget.samples=80", "codec.name=qsgd8",
        "simulation.dtype=float32", "simulation.compute_time=exponential", *ROUGH[:2],
    )  # fmt: skip
    saved = Saved(*settings)
    saved.run()
    branches = [topology.tree_branches(saved.network.topology, rank) for rank in range(4)]
    mean = np.zeros(8)
    for rank, state in saved.states.items():
        mean += state["sum"]
        for name, residual in state.items():
            if name.startswith("owed/"):
                subtree_size = branches[rank][int(name[5:])] if graph == "ring" else 1
                mean += subtree_size * residual
    assert any(state["owed/1"].any() for rank, state in saved.states.items() if "owed/1" in state)
    simulation = Resumed(saved, *settings)
    simulation.updates = _integers(round_to_grid(mean / 4))
    assert simulation.run()["waits"] == 4  # each rank once
    simulation.check_agreement()
    assert min(simulation.network.gradient_counts) > 10


class Mortal(VirtualEndpoint):
    """Knows after time 5 that rank 2 is dead."""

    def neighbours(self) -> list[int]:
        dead = self._network.clock.now > 5
        return [rank for rank in super().neighbours() if not (dead and rank == 2)]


def test_on_the_complete_graph_the_others_go_on_without_a_dead_rank() -> None:
    simulation = Watched("simulation.ranks=4", "budget.samples=200", endpoint=Mortal)
    begin, victim = simulation._start_gradient, simulation.algorithms[2]
    simulation._start_gradient = lambda rank: (  # type: ignore[method-assign]
        begin(rank) if rank != 2 or simulation.clock.now < 3 else None
    )
    victim.absorb = lambda step: None  # type: ignore[method-assign]
    simulation.run()
    survivors = [simulation.algorithms[rank] for rank in (0, 1, 3)]
    assert not any(algorithm.required_ranks for algorithm in survivors)
    assert all(algorithm.is_drained for algorithm in survivors)
    assert len({simulation.models[rank].tobytes() for rank in (0, 1, 3)}) == 1
    assert simulation.locals[2].local_step < 5 < 20 < simulation.locals[0].local_step
    relayed = Watched("simulation.ranks=4", "algorithm.relay=tree")
    relayed.algorithms[0].start()
    assert relayed.algorithms[0].required_ranks == set(range(4))


@pytest.mark.mpi
def test_four_ranks_on_windows_end_with_the_same_bits(tmp_path: Path) -> None:
    train(
        4, tmp_path, "algorithm.name=dasgd", "codec.name=qsgd8", "optimizer.lr=0.015",
        "budget.epochs=10", "evaluation.live=false", "evaluation.count=2", together=True,
    )  # fmt: skip
    results = load_run(tmp_path / "run").results
    assert (
        results.consensus["consensus_distance"][-1]
        == 0
        < results.consensus["consensus_distance"][0]
    )
    assert results.consensus["mean_test_accuracy"][-1] > 0.9
    found = history(results)
    assert len(found.mean) == results.rank_table["steps"].sum()
    assert (found.propagation >= 0).all()  # every gradient has reached all
    assert 0.5 < found.average < 40


def test_what_the_user_writes_between_steps_stays_in_one_replica() -> None:
    ranks = Ranks(np.full((3, 4), 2.0), AlgorithmConfig(name="dasgd"))
    for rank in range(3):
        ranks.step(rank)
    ranks.models[0, :2] = 7.0  # while updates of the others wait
    for _ in range(3):
        for rank in range(3):
            ranks.step(rank)
    ranks.models[0, 3] = -1.0
    for algorithm, local in zip(ranks.algorithms, ranks.locals, strict=True):
        algorithm.absorb(local.local_step)
    # 12 gradients of 1; two of them were in flight, or in the inbox, at the first write.
    np.testing.assert_array_equal(ranks.models[1], np.full(4, 2.0 - 12))
    np.testing.assert_array_equal(ranks.models[2], ranks.models[1])
    first, second = ranks.models[0, 0], ranks.models[0, 2]
    assert second == -10.0 and ranks.models[0, 3] <= -1.0
    assert first == 7.0 - 9 - 2, "all gradients but the first own one come after the write"
