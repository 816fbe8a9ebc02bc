"""The jobs of every algorithm do what they say, and the virtual clock does what real windows do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd import algorithms, config
from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.simulator import Simulator
from mpi_dasgd.storage.schema import APPLIED, INITIATED
from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled

JOBS = sorted((ROOT / "jobs" / "digits").glob("*.toml"))
PROGRAM = ROOT / "tests" / "programs" / "train_jobs.py"
pytestmark = pytest.mark.timeout(600)  # the first test trains by all jobs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks on real windows have trained by every job."""
    directory = tmp_path_factory.mktemp("jobs")
    run_pooled(4, PROGRAM, str(directory), *map(str, JOBS), timeout=500)
    return directory


def test_every_algorithm_has_a_job() -> None:
    names = {config.load(job).algorithm.name for job in JOBS}
    assert names == set(algorithms.ALGORITHMS) - {"alone"}
    assert [job.stem for job in JOBS] == [config.load(job).algorithm.name for job in JOBS]


@pytest.mark.mpi
def test_every_algorithm_learns_the_digits(trained: Path) -> None:
    accuracy = {}
    for job in JOBS:
        run = load_run(trained / config.load(job).run.name)
        assert run.results.attributes["status"] == "finished", job.name
        accuracy[job.stem] = float(run.evaluations().mean[-1])
    assert min(accuracy.values()) >= 0.96, accuracy


def _replayed(directory: Path, **changed: object) -> Simulator:
    """Simulate the algorithm of a run with the step times that were recorded."""
    run = load_run(directory)
    algorithm = {k: v for k, v in run.config["algorithm"].items() if v is not None}
    settings = {
        "simulation.ranks": 4,
        "simulation.compute_time": "recorded",
        "simulation.recorded_run": directory,
        "simulation.latency": 0,
        "budget.samples": int(run.results.n_records["train"].sum()),
        **{f"algorithm.{key}": str(value).lower() for key, value in algorithm.items()},
        **changed,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return Simulator(config.load(ROOT / "jobs" / "sim_quadratic.toml", overrides))


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["adpsgd", "swarm", "dasgd", "osgp"])
def test_real_and_simulated_staleness_agree(trained: Path, name: str) -> None:
    """Delays agree within 30 %, ages within a few steps and by half in seconds.

    On the virtual clock an exchange is an instant, and all of the optimizer's time lies before it.
    So a pair average, whose age is taken when it is done, is older on windows by its duration.
    """
    run = load_run(trained / f"digits-{name}")
    simulation = _replayed(run.path)
    simulation.run()
    assert np.mean(simulation.meter.delays) == pytest.approx(
        run.column("train", "delay").mean(), rel=0.3
    )
    read = np.isin(run.column("exchange", "kind"), (INITIATED, APPLIED))
    steps, seconds = (run.column("exchange", key)[read] for key in ("age_steps", "age_s"))
    for share in (0.1, 0.5, 0.9):
        real, virtual = (np.quantile(ages, share) for ages in (steps, simulation.meter.ages))
        assert virtual == pytest.approx(real, rel=0.3, abs=3)
    exchange = np.median(run.column("train", "exchange_s")) if name in ("adpsgd", "swarm") else 0.0
    virtual = np.median(simulation.meter.ages_s) + exchange
    assert virtual == pytest.approx(np.median(seconds), rel=0.5)


@pytest.mark.mpi
def test_recorded_times_are_of_as_many_ranks(trained: Path) -> None:
    with pytest.raises(
        UserError, match=r"simulation\.recorded_run: .* has 4 ranks, and 3 are simulated"
    ):
        _replayed(trained / "digits-adpsgd", **{"simulation.ranks": 3})
