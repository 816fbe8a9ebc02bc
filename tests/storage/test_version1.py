"""Files that the package wrote in format version 1 open with the right values.

tests/data/version1 is a run of two ranks, 816 samples in all, with a checkpoint at its end.
"""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.errors import UserError
from mpi_dasgd.simulation.recorded_times import recorded_times
from mpi_dasgd.storage.checkpoint import Checkpoints, good_indices, load
from tests.support.mpi_ranks import ROOT, run_ranks

DATA = ROOT / "tests" / "data" / "version1"


@pytest.fixture(params=["results.h5", "run files"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The old run, once with its results.h5 and once with the files of its ranks alone."""
    if request.param == "results.h5":
        shutil.copy(DATA / "results.h5", tmp_path)
    else:
        (tmp_path / "ranks").mkdir()
        for packed in (DATA / "ranks").glob("*.h5.gz"):
            unpacked = tmp_path / "ranks" / packed.name.removesuffix(".gz")
            unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
    return tmp_path


def test_columns_have_the_names_of_today(run: Path) -> None:
    results = load_run(run).results
    assert results.attributes["world_size"] == 2
    assert results.n_records["train"].tolist() == [60, 42]
    train, exchange, ranks = results.tables["train"], results.tables["exchange"], results.rank_table
    assert train["total_samples"][:, :3].tolist() == [[8, 16, 24], [32, 40, 48]]
    assert train["time_s"][0, 59] == pytest.approx(0.12072129)
    assert (exchange["set_staleness"] == -1).all()
    assert results.tables["evaluation"]["total_samples"][:, -1].max() == 816
    assert ranks["claims_lost"].tolist() == [22, 3]
    assert not ranks.keys() & {"taken", "refusals", "retries"}


def test_the_report_has_the_figures_that_were_reported_then(run: Path) -> None:
    """As `mpi-dasgd report --json` of the version that wrote the run printed them."""
    summary = load_run(run).summary()
    expected = {
        "algorithm": "adpsgd",
        "codec": "lattice8",
        "topology": "complete",
        "ranks": 2,
        "samples": 816,
        "wall_s": 0.1338662260000092,
        "samples_per_s": 6095.637595699038,
        "train_loss": 0.024393825558945537,
        "worst_rank_accuracy": 0.9734513274336283,
        "staleness_mean": 4.5519480519480515,
        "staleness_max": 19,
        "delay_mean": 0.49019607843137253,
        "delay_max": 5,
        "exchanges": 77,
        "bytes_per_exchange": 2432.0,
        "bytes_sent": 93632,
    }
    assert {name: summary[name] for name in expected} == expected


def test_the_milestones_have_the_names_of_today() -> None:
    consensus = load_run(DATA / "results.h5").results.consensus
    assert consensus["total_samples"].tolist() == [432, 816]
    np.testing.assert_allclose(consensus["time_s"], [0.05997585, 0.13332931], rtol=1e-6)


def test_a_simulation_can_repeat_its_times(run: Path) -> None:
    times = recorded_times(str(run), 2)
    rng = np.random.default_rng(0)
    drawn = [times.draw(0, rng) for _ in range(61)]
    assert drawn[60] == drawn[0] > 0  # 60 steps, and from the beginning again
    assert sum(drawn[:60]) < 0.12072129
    assert times.exchange_seconds(0) > 0


def test_its_configuration_is_read_under_the_keys_of_today() -> None:
    text = load_run(DATA / "results.h5").results.attributes["config_json"]
    settings = config.Config.model_validate_json(text)
    assert settings.algorithm.order == "adapt_then_combine"
    assert settings.algorithm.max_attempts == 3
    assert settings.codec.scale_decay == 0.8
    assert settings.transport.heartbeat_timeout == 20


def test_its_checkpoint_is_found_and_loaded(tmp_path: Path) -> None:
    shutil.copytree(DATA / "checkpoints", tmp_path / "checkpoints")
    assert good_indices(tmp_path / "checkpoints", 1) == [2]
    for rank, steps in enumerate((60, 42)):
        arrays, meta = load(tmp_path / "checkpoints", rank, size=2)
        assert (meta["index"], meta["rank"], meta["local_step"]) == (2, rank, steps)
        assert np.isfinite(arrays["model"]).all() and arrays["model"].any()
    # A run that goes on from it removes it in time, under its old name.
    saves = Checkpoints(tmp_path / "checkpoints", 0, 1, resumed=2)
    for index in (3, 4):
        saves.save(index, {"model": np.zeros(3)}, {})
        saves.wait()
    saves.close()
    assert not list((tmp_path / "checkpoints").glob("step*"))
    assert len(list((tmp_path / "checkpoints").glob("checkpoint*.json"))) == 2


@pytest.mark.mpi
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(DATA / "checkpoints", tmp_path / "run" / "checkpoints")
    program = "import sys; from mpi_dasgd import cli; sys.exit(cli.main(['train', *sys.argv[1:]]))"
    keys = ["run.name=run", f"run.directory={tmp_path}", "run.resume=true", "budget.samples=1600"]
    keys += ["task.name=breast_cancer", "task.model=logistic", "task.batch_size=8"]
    run_ranks(2, program, str(ROOT / "jobs" / "train.toml"), *keys, "evaluation.count=1")
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert file.attrs["resumed_from_checkpoint"] == 2
        first = [rows[0] for rows in file["train/step"]]
    assert first == [61, 43]


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    message = "expected format version 2 or below, found 3: a newer mpi_dasgd has written it"
    newer = tmp_path / "results.h5"
    newer.write_bytes((DATA / "results.h5").read_bytes())
    with h5py.File(newer, "r+") as file:
        file.attrs["format_version"] = 3
    with pytest.raises(UserError, match=rf"results\.h5: {message}"):
        load_run(newer)
    folder = tmp_path / "checkpoints"
    shutil.copytree(DATA / "checkpoints", folder)
    manifest = folder / "step00000002.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 3}))
    with pytest.raises(UserError, match=rf"step00000002\.json: {message}"):
        load(folder, 0)


def test_files_of_today_say_their_version(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path, 0, 1)
    saves.save(1, {"model": np.zeros(3)}, {})
    saves.close()
    manifest = json.loads((tmp_path / "checkpoint00000001.json").read_text())
    assert (manifest["format_version"], manifest["index"]) == (2, 1)
    with h5py.File(tmp_path / "checkpoint00000001.rank00000.h5") as file:
        assert file.attrs["format_version"] == 2
