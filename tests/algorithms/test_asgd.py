"""asgd and minibatch: delays, concurrency, work items, bias; also on windows."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpi_dasgd import algorithms, config, topology
from mpi_dasgd.algorithms.asgd import ASGD
from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.staleness.delay_meter import DelayMeter
from mpi_dasgd.storage.schema import APPLIED
from mpi_dasgd.transport.virtual.endpoint import VirtualEndpoint
from mpi_dasgd.transport.virtual.network import Network
from tests.support.random_delays import RandomDelays
from tests.support.training import train

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"
N = 16  # workers; rank 0 is the server
WORKS = ("algorithm.server_trains=true", f"simulation.ranks={N}")
MINIBATCH = "algorithm.name=minibatch"
UNIFORM = "algorithm.client_sampling=uniform"
SLOW = "simulation.slow_ranks=[3]"
HALF = f"simulation.slow_ranks={list(range(1, N // 2 + 1))}"


def _simulation(*overrides: str, endpoint: Any = VirtualEndpoint) -> Simulator:
    base = [
        "algorithm.name=asgd", f"simulation.ranks={N + 1}", "simulation.latency=0",
        "optimizer.lr=0.0005", "budget.samples=2000",
    ]  # fmt: skip
    return Simulator(config.load(JOB, [*base, *overrides]), endpoint)


def _meter(simulation: Simulator) -> DelayMeter:
    server = simulation.algorithms[0]
    assert isinstance(server, ASGD)
    return server.meter


def _run(*overrides: str, endpoint: Any = VirtualEndpoint) -> tuple[Any, DelayMeter]:
    simulation = _simulation(*overrides, endpoint=endpoint)
    records: list[Any] = []
    for algorithm in simulation.algorithms:
        algorithm.records.record = records.append
    drain, simulation.drain = simulation.drain, lambda: None  # type: ignore[method-assign]
    figures = simulation.run()
    meter = _meter(simulation)
    assert not figures["diverged"]
    assert figures["gradients"] == simulation.max_gradients, "the ranks wait for each other"
    assert (
        figures["server_delay_average"] == meter.average
    )  # before the end, where points are given up
    delays = [record.step - record.partner_step for record in records if record.kind == APPLIED]
    assert sum(delays) == meter.applied_sum and len(delays) == meter.applied
    assert figures["server_delay_mean"] == meter.applied_average
    assert figures["delay_mean"] is None, "the server counts delays, not the simulator's driver"
    figures["delays_of"] = {
        client: [
            r.step - r.partner_step for r in records if (r.kind, r.partner) == (APPLIED, client)
        ]
        for client in range(simulation.size)
    }
    _assert_identity(meter)
    drain()
    _assert_identity(meter)
    return figures, meter


def _assert_identity(meter: DelayMeter) -> None:
    """Every work item but the one applied ages by one in an iteration: whatever the schedule."""
    ages = meter.applied_sum + meter.in_flight_sum + meter.given_up_sum
    assert ages == meter.concurrency_sum - meter.applied


def _brute_force(meter: DelayMeter, steps: int, rng: random.Random) -> None:
    """Drive `meter` at random, and compare it with lists."""
    jobs: list[tuple[int, int]] = []
    delays: dict[int, list[int]] = {}
    concurrency, given_up, applied = [], 0, 0
    for _ in range(steps):
        what = rng.random()
        if what < 0.5 or not jobs:
            client = rng.randrange(5)
            jobs.append((client, applied))
            meter.start(client)
        elif what < 0.95:
            client, start = jobs.pop(rng.randrange(len(jobs)))
            concurrency.append(len(jobs) + 1)
            assert meter.holds(client, start)
            assert meter.apply(client, start) == applied - start
            delays.setdefault(client, []).append(applied - start)
            applied += 1
        else:
            client = rng.randrange(5)
            gone = [start for owner, start in jobs if owner == client]
            jobs = [(owner, start) for owner, start in jobs if owner != client]
            given_up += sum(applied - start for start in gone)
            assert meter.give_up(client) == len(gone)
    every = [delay for each in delays.values() for delay in each]
    ages = [applied - start for _, start in jobs]
    assert meter.average == sum(every + ages) / max(1, applied + max(1, len(jobs)) - 1)
    assert meter.applied_average == np.mean(every)
    assert meter.maximum == max(every + ages)
    assert meter.concurrency == np.mean(concurrency)
    assert meter.concurrency_max == max(concurrency)
    assert meter.fraction_above(5) == np.mean(np.array(every) > 5)
    assert meter.given_up_sum == given_up
    _assert_identity(meter)


@pytest.mark.parametrize("seed", range(5))
def test_the_meter_agrees_with_brute_force(seed: int) -> None:
    _brute_force(DelayMeter(), 600, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "above", "slowest"),
    [
        (["simulation.compute_time=constant"], 0.0, N),
        (["simulation.compute_time=lognormal", "simulation.compute_sigma=0.05"], 0.08, 40),
        (["simulation.compute_time=exponential"], 0.33, 400),
        (["simulation.compute_time=constant", SLOW], 0.0066, 10 * N),
        (["simulation.compute_time=constant", SLOW, "simulation.slow_factor=100"], 0.0007, 100 * N),
        (["simulation.compute_time=constant", HALF, "simulation.slow_factor=2"], 1 / 3, 2 * N),
    ],
    ids=["equal", "jitter", "exponential", "one 10x slower", "one 100x slower", "half 2x slower"],
)
def test_average_delay_is_concurrency_whatever_the_speeds(
    schedule: list[str], above: float, slowest: int
) -> None:
    figures, _ = _run(*schedule)
    applied = figures["applied"]
    assert figures["server_delay_average"] == applied * (N - 1) / (applied + N - 1)
    assert figures["concurrency"] == figures["concurrency_max"] == N
    assert figures["delayed_fraction"] == pytest.approx(above, abs=0.03)  # share with tau > n
    assert figures["server_delay_max"] <= slowest
    if SLOW in schedule:
        assert figures["server_delay_max"] > slowest / 2
        assert np.mean(figures["delays_of"][3]) > 5 * np.mean(figures["delays_of"][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "concurrency"),
    [
        ([UNIFORM], N),
        ([UNIFORM, SLOW, "simulation.compute_time=exponential"], N),
        ([UNIFORM, "algorithm.concurrency=5"], 5),
        (["algorithm.concurrency=5", SLOW], 5),
        (["algorithm.concurrency=40", "transport.inbox_slots=1"], 40),
        ([UNIFORM, "algorithm.concurrency=40", "simulation.latency=0.3", SLOW], 40),
        (["simulation.latency=0.3", "simulation.compute_time=exponential"], N),
        (list(WORKS), N),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_concurrency_is_constant(setting: list[str], concurrency: int) -> None:
    figures, _ = _run(*setting, "budget.samples=1600")
    applied = figures["applied"]
    assert figures["concurrency"] == figures["concurrency_max"] == concurrency
    expected = applied * (concurrency - 1) / (applied + concurrency - 1)
    assert figures["server_delay_average"] == expected


@pytest.mark.parametrize(
    "setting",
    [[], [SLOW], ["simulation.latency=0.2"], list(WORKS)],
    ids=["plain", "slow", "latency", "works"],
)
def test_delays_of_minibatch(setting: list[str]) -> None:
    figures, meter = _run(MINIBATCH, *setting, "budget.samples=1600")
    assert figures["server_delay_mean"] == (N - 1) / 2  # applied gradients: whole batches
    assert figures["server_delay_max"] == N - 1
    assert figures["concurrency"] == (N + 1) / 2  # N, N - 1, ..., 1
    assert set(meter.histogram.values()) == {1600 // N}


@pytest.mark.parametrize("compute", ["constant", "uniform", "lognormal", "exponential"])
def test_no_worker_waits_for_a_server_without_latency(compute: str) -> None:
    figures, _ = _run(f"simulation.compute_time={compute}", SLOW, "budget.samples=1600")
    assert figures["waits"] == 0 == figures["wait_time"]


def test_minibatch_waits_for_the_slowest() -> None:
    figures, _ = _run(MINIBATCH, "simulation.compute_time=constant", SLOW, "budget.samples=320")
    assert figures["wait_time"] == 320 // N * (N - 1) * 9  # all others, for 9 of 10 units


@pytest.mark.parametrize("ranks", [N, N + 1])
def test_with_latency_a_worker_waits_for_the_server_only(ranks: int) -> None:
    figures, _ = _run(
        "simulation.latency=0.25", f"simulation.ranks={ranks}", "transport.inbox_slots=16", SLOW,
        "budget.samples=1600",
    )  # fmt: skip
    # there and back for every gradient that was answered, whichever rank is slow
    assert figures["wait_time"] == pytest.approx(0.5 * figures["gradients"], rel=0.02)


def _jittery(network: Network, rank: int) -> VirtualEndpoint:
    """Every message has a delay of its own; those of a sender keep their order."""
    return VirtualEndpoint(network, rank, RandomDelays(random.Random(rank), mean=0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "samples"),
    [
        (["simulation.ranks=8", SLOW], 7000),
        (["simulation.ranks=7", UNIFORM, "algorithm.concurrency=9"], 6000),
        (["simulation.ranks=7", MINIBATCH], 3000),
        (["simulation.ranks=8", MINIBATCH, "algorithm.server_trains=true"], 3000),
        (["simulation.ranks=8", "algorithm.server_trains=true"], 3000),
    ],
    ids=["free", "uniform", "minibatch", "minibatch works", "works"],
)
def test_no_deadlock_whatever_the_delays(setting: list[str], samples: int) -> None:
    """1e5 events in all; `_run` sees that no gradient of the budget is missing."""
    figures, _ = _run(
        *setting, "simulation.latency=0.1", "simulation.compute_time=exponential",
        "simulation.gradients=false", "simulation.dimension=1", f"budget.samples={samples}",
        endpoint=_jittery,
    )  # fmt: skip
    assert figures["events"] > 4 * samples


@pytest.mark.parametrize(
    "setting",
    [
        [SLOW],
        ["algorithm.concurrency=40", "transport.inbox_slots=1"],
        [UNIFORM, SLOW, "simulation.latency=0.3"],
        [MINIBATCH],
        list(WORKS),
        [MINIBATCH, *WORKS],
    ],
    ids=lambda value: " ".join(value),
)
def test_each_gradient_is_of_the_point_that_its_job_names(setting: list[str]) -> None:
    """On 1/2 |x|^2 the gradient *is* the point: it must equal x_s to the bit."""
    simulation = _simulation(*setting, "optimizer.lr=0.01", "budget.samples=640")
    server = simulation.locals[0]
    points, gradients, starts = [simulation.models[0].copy()], [], []
    update = server.apply

    def spy(factor: float = 1.0) -> None:
        gradients.append(server.gradient.copy())
        update(factor)
        points.append(simulation.models[0].copy())

    server.apply = spy  # type: ignore[method-assign]
    simulation.algorithms[0].records.record = lambda exchange: starts.append(exchange.partner_step)
    simulation.run()
    assert len(gradients) == len(starts) > 500
    for gradient, start in zip(gradients, starts, strict=True):
        assert (gradient == points[start]).all()


def test_effective_step_is_the_number_of_ranks() -> None:
    for setting in ([], [UNIFORM], [MINIBATCH]):
        figures, _ = _run(*setting, "optimizer.lr=0.0002", "budget.samples=1200")
        assert figures["effective_step"] == pytest.approx(N + 1, rel=0.03), setting


def test_minibatch_is_allreduce_with_n_times_its_rate() -> None:
    batches = _simulation(MINIBATCH, "optimizer.lr=0.001", "simulation.condition=7")
    whole = _simulation(
        "algorithm.name=allreduce", f"simulation.ranks={N}", f"optimizer.lr={0.001 * N}",
        "simulation.condition=7",
    )  # fmt: skip
    batches.run(), whole.run()
    np.testing.assert_allclose(batches.models[0], whole.models[0], rtol=1e-12)
    assert np.abs(whole.models[0]).max() < 0.5 * np.abs(whole.problem.start).max()


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        (["inverse"], lambda tau: 1 / tau),
        (["capped"], lambda tau: N / tau),
        (["capped", "algorithm.delay_cap=5"], lambda tau: 5 / tau),
        (["drop"], lambda tau: 0.0),
        (["inverse", "algorithm.delay_threshold=3"], lambda tau: 1 / tau),
    ],
    ids=["inverse", "capped", "capped 5", "drop", "inverse above 3"],
)
def test_step_rules(rule: list[str], factor: Callable[[int], float]) -> None:
    """Theorem 8: eta up to tau_C, which is the concurrency, and less beyond."""
    simulation = _simulation(
        f"algorithm.delay_adaptive_rule={rule[0]}", *rule[1:],
        "simulation.compute_time=exponential",
        "budget.samples=800", "optimizer.options={momentum=0.9}",
    )  # fmt: skip
    threshold = 3 if "algorithm.delay_threshold=3" in rule else N
    factors: list[float] = []
    expected: list[float] = []
    update = simulation.locals[0].apply

    def spy(factor: float = 1.0) -> None:
        factors.append(factor)
        update(factor)

    def record(exchange: Any) -> None:
        delay = exchange.step - exchange.partner_step
        expected.append(1.0 if delay <= threshold else factor(delay))

    simulation.locals[0].apply = spy  # type: ignore[method-assign]
    simulation.algorithms[0].records.record = record
    figures = simulation.run()
    assert factors == [value for value in expected if value]  # what is dropped moves no momentum
    reduced = np.mean(np.array(expected) < 1)
    assert figures["delayed_fraction"] == pytest.approx(reduced, abs=0.01) and reduced > 0.25


def _gradients_a_second(demands: Sequence[float], jobs: int) -> float:
    """Throughput of a closed network of exponential servers (Buzen 1973), with uniform routing."""
    sums = np.eye(1, jobs + 1)[0]
    for demand in demands:
        for number in range(1, jobs + 1):
            sums[number] += demand * sums[number - 1]
    return float(sums[jobs - 1] / sums[jobs])


@pytest.mark.slow
@pytest.mark.parametrize(("concurrency", "slow"), [(1, 4), (4, 4), (40, 0)])
def test_time_of_uniform_clients(concurrency: int, slow: int) -> None:
    """Lemma 11: C gradients take the mean of the clients' times if none waits for a busy client.

    With C well below n few do; queueing theory has the exact figure.
    """
    n = 40
    figures, _ = _run(
        UNIFORM, f"simulation.ranks={n + 1}", "simulation.compute_time=exponential",
        f"algorithm.concurrency={concurrency}", f"simulation.slow_ranks={list(range(1, slow + 1))}",
        "simulation.slow_factor=6", "budget.samples=4000",
    )  # fmt: skip
    times = [6.0] * slow + [1.0] * (n - slow)
    exact = _gradients_a_second([time / n for time in times], concurrency)
    assert figures["applied"] / figures["virtual_time"] == pytest.approx(exact, rel=0.06)
    if concurrency == 1:
        assert 1 / exact == pytest.approx(np.mean(times))
    if concurrency == 4:
        assert 4 / exact == pytest.approx(np.mean(times), rel=0.25)


@functools.cache
def _fixed_point(*overrides: str) -> tuple[np.ndarray, np.ndarray]:
    """Where a run ends, half of the workers 4 times slower, and the minima b_i of their functions.

    It is the mean of x over the second half of the run.
    """
    simulation = _simulation(
        "simulation.heterogeneity=1", "simulation.dimension=24", "optimizer.lr=0.005",
        "simulation.compute_time=exponential", HALF, "simulation.slow_factor=4",
        "budget.samples=5000",
        *overrides,
    )  # fmt: skip
    total = np.zeros(24)

    def record(exchange: Any) -> None:
        if exchange.step >= 2500:
            total[:] += simulation.models[0]

    simulation.algorithms[0].records.record = record
    applied = simulation.run()["applied"]
    minima = simulation.problem._minima[1:]  # type: ignore[attr-defined]
    assert np.abs(minima.mean(0)).max() < 1e-12  # so that the right end is 0
    return total / (int(applied) - 2500), minima


@pytest.mark.slow
def test_idle_clients_minimize_the_wrong_function() -> None:
    """Idle clients: sum p_i f_i, p_i the share of gradients; uniform: the mean. Section 5."""
    free, minima = _fixed_point()
    speeds = np.array([1 / 4] * (N // 2) + [1.0] * (N // 2))
    biased = speeds / speeds.sum() @ minima
    size = np.linalg.norm(biased)
    uniform, _ = _fixed_point(UNIFORM)
    assert np.linalg.norm(free - biased) < 0.25 * size
    assert np.linalg.norm(uniform) < 0.25 * size


@pytest.mark.slow
def test_adaptive_steps_bring_the_bias_back() -> None:
    uniform, minima = _fixed_point(UNIFORM)
    adaptive, _ = _fixed_point(UNIFORM, "algorithm.delay_adaptive_rule=drop")
    fast = minima[N // 2 :].mean(0)  # whose gradients are the young ones
    towards = adaptive @ fast / (fast @ fast)
    assert towards > 0.3 > abs(uniform @ fast / (fast @ fast))


class _Mortal(VirtualEndpoint):
    """Rank 5 is dead from time 20 on: it sends nothing any more."""

    def _dead(self) -> bool:
        return self._network.clock.now > 20

    def neighbours(self) -> Sequence[int]:
        return [rank for rank in super().neighbours() if not (rank == 5 and self._dead())]

    def _after_transfer(self, event: Callable[[], None]) -> None:
        if not (self.rank == 5 and self._dead()):
            super()._after_transfer(event)


@pytest.mark.parametrize("setting", [[], [UNIFORM], [MINIBATCH], [MINIBATCH, *WORKS]])
def test_the_points_of_a_dead_worker_go_to_others(setting: list[str]) -> None:
    figures, meter = _run(*setting, "simulation.latency=0.1", endpoint=_Mortal)
    if MINIBATCH in setting:
        assert meter.histogram[N - 2] > 100 > meter.histogram[N - 1]  # batches of one less
    else:
        assert figures["concurrency"] == N
        assert sum(figures["delays_of"][5]) > 0


def test_without_workers_the_server_says_so() -> None:
    class _Alone(VirtualEndpoint):
        def neighbours(self) -> Sequence[int]:
            return super().neighbours() if self._network.clock.now < 5 else ()

    with pytest.raises(PeerLost, match="last worker"):
        _simulation("budget.samples=1600", endpoint=_Alone).run()


def test_a_resumed_run_gives_all_a_new_point() -> None:
    first = _simulation("budget.samples=320")
    first.run()
    state = first.algorithms[0].state()
    second = _simulation("budget.samples=640", "algorithm.concurrency=20")
    for algorithm in second.algorithms:
        start = algorithm.start

        def resume(algorithm: Any = algorithm, start: Callable[[], None] = start) -> None:
            start()
            if algorithm.endpoint.rank == 0:
                algorithm.load_state(state)
            algorithm.restart(20)

        algorithm.start = resume  # type: ignore[method-assign]
    starts: list[int] = []
    second.algorithms[0].records.record = lambda exchange: starts.append(exchange.partner_step)
    figures = second.run()
    assert figures["gradients"] - N == figures["applied"]  # one a worker was of an old point
    assert starts[:20] == [int(state["iteration"])] * 4 + starts[4:20] and min(starts) == starts[0]
    assert figures["concurrency"] == 20
    _assert_identity(_meter(second))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.local_steps=4"], ["algorithm.local_steps", "'asgd'", "expected 1, got 4"]),
        (["algorithm.server_trains=true", UNIFORM], ["algorithm.server_trains", "uniform"]),
        (["algorithm.server_trains=true", "algorithm.concurrency=3"], ["server_trains", "concurr"]),
        (["topology.graph=ring"], ["topology.graph", "'ring'", "rank 0", "complete"]),
        ([MINIBATCH, UNIFORM], ["algorithm.client_sampling", "'minibatch'", "'uniform'"]),
        ([MINIBATCH, "algorithm.concurrency=3"], ["algorithm.concurrency", "got 3"]),
        (
            [MINIBATCH, "algorithm.delay_adaptive_rule=drop"],
            ["algorithm.delay_adaptive_rule", "'drop'"],
        ),
        (["simulation.ranks=1"], ["at least 2 ranks"]),
        (["codec.name=bf16"], ["codec.name", "'asgd'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_settings_that_a_server_cannot_follow_are_refused(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _simulation(*overrides)
    assert [word for word in words if word not in str(error.value)] == []


def test_warnings_of_heterogeneous_data() -> None:
    def warnings(*overrides: str) -> str:
        settings = config.load(None, ["task.data=sharded", "algorithm.name=asgd", *overrides])
        return "\n".join(algorithms.find(settings.algorithm.name).warnings(settings))

    assert "algorithm.client_sampling" in warnings() and "delay_adaptive_rule" not in warnings()
    assert warnings(UNIFORM) == warnings("task.data=shared") == warnings(MINIBATCH) == ""
    assert "delay_adaptive_rule" in warnings(UNIFORM, "algorithm.delay_adaptive_rule=inverse")
    assert "inbox_slots" in warnings("task.data=shared", "algorithm.server_trains=true")


def test_a_star_is_graph_enough(tmp_path: Path) -> None:
    (tmp_path / "star").write_text("0 1\n0 2\n0 3\n")
    star = topology.build("edge_list", 4, file=str(tmp_path / "star"))
    ASGD.validate(4, config.Config().algorithm, star)


@pytest.mark.mpi
def test_full_inboxes_do_not_hold_up_the_end(tmp_path: Path) -> None:
    """Models find no slot when the server ends: it must go on receiving gradients."""
    train(
        4, tmp_path, "algorithm.name=asgd", UNIFORM, "algorithm.concurrency=12",
        "transport.mode=rma", "transport.inbox_slots=1", "budget.epochs=2", "optimizer.lr=0.005",
        "evaluation.count=1", "evaluation.live=false",
    )  # fmt: skip
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["status"] == "finished"
        assert file["ranks/concurrency"][0] == pytest.approx(12, rel=0.02)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(4, ["algorithm.name=asgd"]), (3, [MINIBATCH, "algorithm.server_trains=true"])],
    ids=["asgd", "minibatch"],
)
def test_ranks_learn_the_digits_with_a_server(
    tmp_path: Path, ranks: int, settings: list[str]
) -> None:
    train(
        ranks, tmp_path, *settings, "budget.epochs=12", "optimizer.lr=0.02", "evaluation.count=2",
        "evaluation.live=false",
    )  # fmt: skip
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["status"] == "finished"
        assert file["consensus/mean_test_accuracy"][-1] > 0.9
        rows = {name: values[:] for name, values in file["ranks"].items()}
        exchange = {name: values[0] for name, values in file["exchange"].items()}
    applied = int(rows["applied"][0])
    records = int(exchange["records"])
    assert (exchange["kind"][:records] == APPLIED).all() and records == applied
    assert (exchange["step"][:applied] == np.arange(applied)).all()
    workers = 3
    assert rows["steps"].sum() - workers <= applied <= rows["steps"].sum()
    if ranks == 4:
        assert rows["steps"][0] == 0, "the server has computed"
        # n work items always in flight, but for the last moments
        assert rows["server_delay_mean"][0] == pytest.approx(workers - 1, rel=0.02)
    else:
        assert rows["server_delay_mean"][0] == pytest.approx((workers - 1) / 2, rel=0.02)
        assert rows["server_delay_max"][0] == workers - 1
