"""Consolidation: what the ranks wrote is in results.h5, exactly, and xarray opens it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr

from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.results import consolidate, gather, results_path
from mpi_dasgd.storage.runfile import RunFile, rank_path, read_run_file
from mpi_dasgd.storage.schema import (
    ABSORBED,
    INITIATED,
    SKIPPED,
    TABLES,
    UNKNOWN_AGE,
    EvaluationRow,
    ExchangeRow,
    TrainRow,
)

MILESTONES = 12


def write_run(
    directory: Path,
    *,
    algorithm: str = "swarm",
    codec: str = "lattice8",
    step_s: Sequence[float] = (0.0010, 0.0011, 0.0012, 0.0020),
    wait_s: float = 0.0,
    samples: int = 160_000,
    limit: float = 0.978,
    gap: float = 0.012,
    seed: int = 1,
    close: Mapping[int, str] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write the run files of a plausible run, one step time per rank, and return its consensus.

    Ranks of an asynchronous run take the steps their speed allows; `wait_s` > 0: all take as many.
    """
    random = np.random.default_rng(seed)
    batch, size = 32, len(step_s)
    speeds = 1 / (np.full(size, max(step_s) + wait_s) if wait_s else np.array(step_s))
    wall = samples / (batch * speeds.sum())
    config = {"algorithm": algorithm, "codec": codec, "batch": batch, "learning_rate": 0.05}
    for rank in range(size):
        steps = int(wall * speeds[rank])
        record = RunFile(
            rank_path(directory, rank),
            rank=rank,
            size=size,
            attributes={
                "config_json": json.dumps(config),
                "algorithm": algorithm,
                "codec": codec,
                "seed": seed,
                "task": "digits-cnn",
                "topology": "ring",
                "host": f"node{rank // 2}",
                "device": "cpu",
                "local_rank": rank % 2,
                "python": "3.11.7",
                "mpi_library": "MPICH 5.0",
                **(attributes or {}),
            },
        )
        done = np.arange(1, steps + 1)
        seconds = done / speeds[rank] * random.uniform(0.999, 1.001, steps)
        progress = (seconds * speeds.sum() * batch).astype(int)
        loss = 0.05 + 2.25 * np.exp(-progress / 22_000) * random.lognormal(0, 0.25, steps)
        moved = 0
        for step in range(steps):
            record.append(
                TrainRow(
                    step=step + 1,
                    time_s=seconds[step],
                    samples=(step + 1) * batch,
                    total_samples=int(progress[step]),
                    loss=loss[step],
                    learning_rate=0.05,
                    compute_s=step_s[rank] * 0.85,
                    exchange_s=step_s[rank] * 0.15,
                    wait_s=1 / speeds[rank] - step_s[rank],
                    delay=0 if wait_s else int(random.poisson(size - 1)),
                    delay_factor=1.0,
                ),
            )
            if wait_s or step % 2:
                continue
            kind = int(random.choice([INITIATED, ABSORBED, SKIPPED], p=[0.48, 0.48, 0.04]))
            partner = int((rank + random.choice([-1, 1])) % size)
            payload = 20_480 if codec == "lattice8" else 39_720
            moved += payload * (kind == INITIATED)
            age = int(random.poisson(3)) + int((speeds[rank] / speeds[partner] - 1) * 5)
            record.append(
                ExchangeRow(
                    step=step + 1,
                    time_s=seconds[step],
                    partner=-1 if kind == SKIPPED else partner,
                    kind=kind,
                    partner_step=-1 if kind == SKIPPED else step + 1 - age,
                    age_steps=UNKNOWN_AGE if kind == SKIPPED else age,
                    age_s=float("nan") if kind == SKIPPED else age * step_s[rank],
                    bytes=payload if kind == INITIATED else 0,
                    retries=int(random.poisson(0.1)),
                    distance=float("nan"),
                    rejected=0,
                    set_staleness=-1,
                ),
            )
        for milestone in range(MILESTONES):
            at = min(steps - 1, int(steps * (milestone + 1) / MILESTONES))
            record.append(
                EvaluationRow(
                    milestone=milestone,
                    step=at + 1,
                    time_s=seconds[at],
                    samples=(at + 1) * batch,
                    total_samples=int(progress[at]),
                    test_loss=0.1 + 2 * np.exp(-progress[at] / 22_000),
                    test_accuracy=float(
                        limit * (1 - np.exp(-progress[at] / 16_000)) - gap * rank / size
                    ),
                ),
            )
        record.close(
            (close or {}).get(rank, "finished"),
            {"messages": steps // 2, "bytes_sent": moved or steps * 39_720, "retries": 5 + rank},
        )
    progress = samples * np.arange(1, MILESTONES + 1) / MILESTONES
    accuracy = limit * (1 - np.exp(-progress / 16_000))
    distance = (
        0.9 * np.exp(-progress / 60_000) * (gap / 0.012) * random.lognormal(0, 0.1, MILESTONES)
    )
    return {
        "total_samples": progress,
        "samples": progress,
        "time_s": wall * np.arange(1, MILESTONES + 1) / MILESTONES,
        "mean_test_loss": 0.08 + 2 * np.exp(-progress / 22_000),
        "mean_test_accuracy": accuracy,
        "worst_test_accuracy": accuracy - gap,
        "best_test_accuracy": accuracy - gap / 4,
        "consensus_distance": distance,
        "consensus_relative": distance / 140,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A finished run of four ranks with its results, and its consensus; tests only read it."""
    directory = tmp_path_factory.mktemp("swarm")
    consensus = write_run(directory)
    assert consolidate(directory, consensus) == results_path(directory)
    return directory, consensus


def test_values_are_those_of_the_ranks_and_padding_is_marked(run: Any) -> None:
    directory, _ = run
    lengths = set()
    with h5py.File(results_path(directory)) as file:
        for rank in range(4):
            record = read_run_file(rank_path(directory, rank))
            for table, columns in TABLES.items():
                for column in columns:
                    values = record.tables[table][column.name]
                    dense = file[table][column.name]
                    assert dense.dtype == column.dtype
                    np.testing.assert_array_equal(dense[rank, : len(values)], values)
                    padding = dense[rank, len(values) :]
                    if column.dtype.startswith("f"):
                        assert np.isnan(padding).all()
                    else:
                        assert (padding == column.fill).all()
                    assert file[table]["records"][rank] == len(values)
            lengths.add(len(record.tables["train"]["step"]))
        assert len(lengths) == 4
        assert file["train/loss"].shape == (4, max(lengths))
        assert file["train/step"].fillvalue == 0
        assert file["train/step"].attrs["_FillValue"] == -1


def test_root_attributes(run: Any) -> None:
    with h5py.File(results_path(run[0])) as file:
        attributes = dict(file.attrs)
    assert attributes["algorithm"] == "swarm"
    assert attributes["codec"] == "lattice8"
    assert attributes["world_size"] == 4
    assert attributes["seed"] == 1
    assert attributes["task"] == "digits-cnn"
    assert attributes["status"] == "finished"
    assert attributes["mpi_library"] == "MPICH 5.0"
    assert json.loads(attributes["config_json"])["batch"] == 32
    assert len(attributes["ranks_lost"]) == 0
    assert "rank" not in attributes
    assert "host" not in attributes


@pytest.mark.filterwarnings("error")
def test_xarray_opens_groups_and_tree(run: Any) -> None:
    directory, consensus = run
    path = results_path(directory)
    with xr.open_dataset(path, engine="h5netcdf", group="exchange") as exchange:
        assert exchange.partner.dims == ("rank", "record")
        assert exchange["rank"].values.tolist() == [0, 1, 2, 3]
        # Padding and skipped exchanges are masked, so plain means are right.
        ages = np.concatenate(
            [
                table["age_steps"][table["kind"] != SKIPPED]
                for rank in range(4)
                for table in [read_run_file(rank_path(directory, rank)).tables["exchange"]]
            ]
        )
        assert float(exchange.age_steps.mean()) == pytest.approx(ages.mean())
        assert exchange.age_s.attrs["units"] == "s"
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert set(tree.children) == {"train", "exchange", "evaluation", "ranks", "consensus"}
        assert tree.attrs["algorithm"] == "swarm"
        assert tree["ranks"].to_dataset()["host"].values.tolist() == [
            "node0",
            "node0",
            "node1",
            "node1",
        ]
        assert tree["ranks"].to_dataset()["status"].values.tolist() == ["finished"] * 4
        assert tree["consensus"].sizes == {"milestone": MILESTONES}
        np.testing.assert_allclose(
            tree["consensus"]["mean_test_accuracy"], consensus["mean_test_accuracy"]
        )
        frame = tree["train"].to_dataset()[["loss", "step"]].to_dataframe().dropna()
    assert len(frame) == sum(gather(directory).n_records["train"])


def test_rank_table(run: Any) -> None:
    directory, _ = run
    with h5py.File(results_path(directory)) as file:
        ranks = {name: data[()] for name, data in file["ranks"].items()}
        assert file["ranks/bytes_sent"].attrs["units"] == "bytes"
    for rank in range(4):
        record = read_run_file(rank_path(directory, rank))
        train = record.tables["train"]
        assert ranks["steps"][rank] == train["step"][-1]
        assert ranks["samples"][rank] == train["samples"][-1]
        assert ranks["wall_s"][rank] == train["time_s"][-1]
        assert ranks["samples_per_s"][rank] == pytest.approx(
            train["samples"][-1] / train["time_s"][-1]
        )
        assert ranks["bytes_sent"][rank] == record.counters["bytes_sent"]
        assert ranks["local_rank"][rank] == rank % 2


def test_lost_and_killed_ranks_are_reported(tmp_path: Path) -> None:
    write_run(tmp_path, samples=8_000)
    rank_path(tmp_path, 1).unlink()
    damaged = rank_path(tmp_path, 2)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    path = consolidate(tmp_path)
    with h5py.File(path) as file:
        assert file.attrs["ranks_lost"].tolist() == [1, 2]
        assert "rank00001.h5 is missing" in file.attrs["ranks_lost_reason"]
        assert "rank00002.h5" in file.attrs["ranks_lost_reason"]
        assert file.attrs["status"] == "degraded"
        assert file.attrs["world_size"] == 4
        assert file["train/rank"][()].tolist() == [0, 3]
        assert "consensus" not in file
        own = file["train/loss"][1, : file["train/records"][1]]
    expected = read_run_file(rank_path(tmp_path, 3)).tables["train"]["loss"]
    np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (["finished", "finished"], "finished"),
        (["finished", "failed"], "failed"),
        (["finished", "running"], "degraded"),
        (["running", "running"], "killed"),
    ],
)
def test_status_of_the_run(tmp_path: Path, statuses: list[str], verdict: str) -> None:
    write_run(tmp_path, step_s=(0.001, 0.001), samples=4_000, close=dict(enumerate(statuses)))
    with h5py.File(consolidate(tmp_path)) as file:
        assert file.attrs["status"] == verdict
        status = [value.decode() for value in file["ranks/status"][()]]
    assert status == [word.replace("running", "killed") for word in statuses]


def test_consolidate_waits_for_late_ranks(tmp_path: Path) -> None:
    write_run(tmp_path, step_s=(0.001,), samples=2_000, attributes={"size": 2})
    first = read_run_file(rank_path(tmp_path, 0))
    rank_path(tmp_path, 0).unlink()
    RunFile(rank_path(tmp_path, 0), rank=0, size=2, attributes={}).close("finished", {})
    late = RunFile(rank_path(tmp_path, 1), rank=1, size=2, attributes={})
    row = TrainRow(**{name: values[0] for name, values in first.tables["train"].items()})

    def end() -> None:
        late.append(row)
        late.close("finished", {"messages": 1})

    threading.Timer(0.3, end).start()
    started = time.monotonic()
    path = consolidate(tmp_path, timeout=30)
    assert time.monotonic() - started < 20
    with h5py.File(path) as file:
        assert file.attrs["status"] == "finished"
        assert file["train/records"][()].tolist() == [0, 1]
        assert file["ranks/messages"][()].tolist() == [-1, 1]


def test_consolidate_does_not_wait_for_the_dead(tmp_path: Path) -> None:
    write_run(tmp_path, step_s=(0.001,) * 3, samples=2_000, close={1: "running"})
    rank_path(tmp_path, 2).unlink()
    started = time.monotonic()
    consolidate(tmp_path, timeout=30, dead={1, 2})
    assert time.monotonic() - started < 10
    started = time.monotonic()
    consolidate(tmp_path, timeout=0.3, dead={2})
    assert time.monotonic() - started >= 0.3


def test_empty_tables_open(tmp_path: Path) -> None:
    for rank in range(2):
        RunFile(rank_path(tmp_path, rank), rank=rank, size=2, attributes={}).close("finished", {})
    with xr.open_datatree(consolidate(tmp_path), engine="h5netcdf") as tree:
        assert tree["exchange"].sizes["record"] == 0
        assert tree["ranks"].to_dataset()["steps"].values.tolist() == [0, 0]


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a run directory"):
        consolidate(tmp_path)
    write_run(tmp_path, step_s=(0.001, 0.001), samples=2_000)
    write_run(tmp_path / "other", step_s=(0.001,) * 3, samples=2_000)
    rank_path(tmp_path / "other", 2).rename(rank_path(tmp_path, 2))
    with pytest.raises(UserError, match=r"runs with \[2, 3\] ranks"):
        consolidate(tmp_path)


def test_consensus_is_checked(run: Any) -> None:
    directory, consensus = run
    with pytest.raises(ValueError, match="unknown columns"):
        consolidate(directory, {"accuracy": np.zeros(3)})
    with pytest.raises(ValueError, match="different lengths"):
        consolidate(directory, consensus | {"time_s": np.zeros(3)})
    assert not list(directory.glob("*.tmp"))
