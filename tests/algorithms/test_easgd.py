"""easgd on the virtual clock: conservation, contraction, effective step, slow centers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.algorithms.easgd import EASGD
from mpi_dasgd.config.schema import EvaluationConfig
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.storage.snapshots import Snapshots
from mpi_dasgd.storage.writer_thread import writer
from mpi_dasgd.training.trainer import Trainer

JOB = Path(__file__).parents[2] / "jobs" / "sim_quadratic.toml"
WORKS = "algorithm.server_trains=true"
OFF = "simulation.gradients=false"


def _simulation(*overrides: str) -> Simulator:
    base = ["algorithm.name=easgd", "simulation.latency=0", "budget.samples=3000"]
    return Simulator(config.load(JOB, [*base, *overrides]))


def _run(*overrides: str) -> dict[str, Any]:
    return _simulation(*overrides).run()


@pytest.mark.parametrize("latency", [0, 0.7])
@pytest.mark.parametrize("setting", [[], [WORKS], ["algorithm.local_steps=3"]], ids=" ".join)
@pytest.mark.parametrize("ranks", [2, 9])
def test_sum_of_models_and_center_is_conserved(
    setting: list[str], latency: float, ranks: int
) -> None:
    common = [*setting, f"simulation.latency={latency}", f"simulation.ranks={ranks}"]
    for gradients in ([OFF], ["simulation.noise=1"]):
        figures = _run(
            *common, *gradients, "simulation.compute_time=exponential", "budget.samples=1200"
        )
        assert figures["conservation_error"] < 1e-12
        assert figures["waits"] == 0
        assert figures["exchanges"] > 100


def test_exchanges_are_those_of_the_paper() -> None:
    """With equal workers and no latency each exchange is [[1 - a, a], [a, 1 - a]] on (x_i, c)."""
    n, alpha = 6, 0.2
    simulation = _simulation(
        OFF, f"simulation.ranks={n}", "simulation.compute_time=constant", "budget.samples=50",
        f"algorithm.moving_rate={alpha}",
    )  # fmt: skip
    models = simulation.models.copy()
    simulation.run()
    for _ in range(50 // (n - 1)):
        for worker in range(1, n):
            delta = alpha * (models[worker] - models[0])
            models[worker] -= delta
            models[0] += delta
    np.testing.assert_allclose(simulation.models, models, rtol=1e-12)


@pytest.mark.parametrize(
    "setting",
    [[], ["simulation.latency=0.3"], ["algorithm.local_steps=4"]],
    ids=" ".join,
)
def test_a_center_has_the_effective_step_one(setting: list[str]) -> None:
    """The center counts as one of n models: one gradient moves their mean by eta/n."""
    assert _run(*setting)["effective_step"] == pytest.approx(1, abs=0.03)


def test_effective_step_with_a_straggler() -> None:
    """Its model lags behind, with a weight of 1/n in the mean."""
    assert _run("simulation.slow_ranks=[3]")["effective_step"] == pytest.approx(1, abs=0.1)


def test_alpha_is_the_papers_by_default() -> None:
    server = _simulation().algorithms[0]
    assert isinstance(server, EASGD)
    server.start()
    assert server.alpha == 0.9 / 15  # workers
    assert not server.computes_gradients and server.x is server.center


@pytest.mark.slow
def test_the_center_converges_and_holds_the_workers() -> None:
    simulation = _simulation(
        "simulation.noise=1", "simulation.condition=5", "optimizer.lr=0.1", "budget.samples=6000"
    )
    figures = simulation.run()
    assert figures["final_distance"] < 0.1  # of the center: gradients have a variance of 8
    distance_sq = np.square(simulation.models[1:] - simulation.models[0]).sum(1)
    assert 0.01 < distance_sq.mean() < 1


def test_a_server_that_works_ends_with_the_center() -> None:
    simulation = _simulation(WORKS, "simulation.noise=1", "transport.inbox_slots=16")
    simulation.run()
    server = simulation.algorithms[0]
    assert isinstance(server, EASGD)
    assert server.center is server.x is simulation.models[0] or np.shares_memory(
        server.x, simulation.models
    )
    workers = simulation.models[1:].mean(0)
    assert np.linalg.norm(simulation.models[0] - workers) < 0.3


def _slow_center(monkeypatch: pytest.MonkeyPatch | None) -> dict[str, Any]:
    """A center that answers 100 times more slowly than its workers ask, with free slots."""
    if monkeypatch is not None:
        exchange = EASGD._exchange

        def unclaimed(self: EASGD, step: int) -> None:
            self._served = -1
            exchange(self, step)

        monkeypatch.setattr(EASGD, "_exchange", unclaimed)
    return _run(
        OFF, WORKS, "simulation.slow_ranks=[0]", "simulation.slow_factor=100",
        "transport.inbox_slots=64", "budget.samples=12000", "simulation.dimension=1",
    )  # fmt: skip


@pytest.mark.slow
def test_a_center_serves_each_worker_once(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = _slow_center(None)
    assert figures["final_disagreement"] < figures["max_disagreement"]
    assert figures["skipped"] > 20 * figures["exchanges"]
    broken = _slow_center(monkeypatch)
    assert broken["max_disagreement"] > 100 * figures["max_disagreement"]


def test_no_room_means_no_exchange() -> None:
    figures = _run("simulation.latency=2", "transport.inbox_slots=1", OFF)
    assert figures["skipped"] > figures["exchanges"] > 50
    assert figures["conservation_error"] < 1e-12 and figures["waits"] == 0


@pytest.mark.parametrize("codec", ["lattice8", "bf16"])
def test_codecs_conserve_the_sum(codec: str) -> None:
    figures = _run(
        f"codec.name={codec}", "simulation.dtype=float32", OFF, "budget.samples=1500",
        "simulation.dimension=64",
    )  # fmt: skip
    assert figures["conservation_error"] < 1e-5
    assert figures["final_disagreement"] < 1e-3 * figures["max_disagreement"]


def test_a_checkpoint_has_the_center_of_a_server_that_works() -> None:
    simulation = _simulation(WORKS, "simulation.noise=1", "transport.inbox_slots=16")
    simulation.drain = lambda: None  # type: ignore[method-assign]
    simulation.run()
    server = simulation.algorithms[0]
    assert isinstance(server, EASGD)
    state = {name: array.copy() for name, array in server.state().items()}
    center = server.center.copy()
    server.center[:] = 0
    server.load_state(state)
    server.restart(100)
    assert (server.center == center).all() and (center != server.x).any()
    published = simulation.endpoints[1].read(0).message
    assert published is not None and (published.payload == center).all()
    assert simulation.algorithms[1].state() == {}


def test_snapshots_have_the_center_of_a_server_that_works(tmp_path: Path) -> None:
    simulation = _simulation(WORKS, "simulation.noise=1", "transport.inbox_slots=16")
    simulation.drain = lambda: None  # type: ignore[method-assign]
    simulation.run()
    server, worker = simulation.algorithms[:2]
    assert isinstance(server, EASGD)
    assert server.model is server.center and (server.model != server.x).any()
    assert worker.model is worker.x

    trainer = object.__new__(Trainer)
    own = SimpleNamespace(gather=lambda: None, to_host=lambda vector: vector)
    buffers = SimpleNamespace(pack=lambda: np.empty(0, np.uint8))
    vars(trainer).update(
        training=SimpleNamespace(
            buffers=buffers,
            algorithm=server,
            parameters=own,
            rank=0,
            elapsed=1.0,
            samples=2,
            total_samples=3,
        ),
        snapshots=Snapshots(tmp_path),
        step=SimpleNamespace(flush=lambda: None),
        config=simulation.config.model_copy(update={"evaluation": EvaluationConfig(live=False)}),
    )
    trainer._pass_milestone(4)
    writer().submit(lambda: None).result()
    saved = trainer.snapshots.load(4, 0)
    assert saved is not None
    np.testing.assert_array_equal(saved.model, server.center)
    assert (saved.time_s, saved.samples, saved.total_samples) == (1, 2, 3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["topology.graph=ring"], ["topology.graph", "'ring'", "complete"]),
        (["simulation.ranks=1"], ["at least 2 ranks"]),
    ],
)
def test_settings_that_easgd_cannot_follow_are_refused(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _simulation(*overrides)
    assert [word for word in words if word not in str(error.value)] == []
