"""The studies, small: shapes that the papers claim, and samples that are read back unchanged."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import cli, config, studies
from mpi_dasgd.studies import linear_theory, trajectory
from mpi_dasgd.studies.dataset import Dataset, loglog_slope, read, spread, write

_MEASURED: dict[str, Dataset] = {}


def _samples(name: str) -> Dataset:
    if name not in _MEASURED:
        _MEASURED[name] = studies.find(name).samples(1, True)
    return _MEASURED[name]


def _figures(name: str) -> dict[str, Any]:
    return studies.find(name).summary(_samples(name)).figures


def _rows(name: str) -> list[dict[str, Any]]:
    return studies.find(name).summary(_samples(name)).rows


@pytest.mark.slow
def test_throughput_with_a_slow_worker_is_that_of_theory() -> None:
    assert _figures("slowdown")["largest_deviation_constant_times"] < 0.02


def test_steps_that_the_theorems_allow_need_sqrt_tau_max_or_nothing() -> None:
    figures = _figures("delay")
    key = "exponent in tau_max: average, rate of the theorems"
    assert figures["constant"][key] == pytest.approx(0.5, abs=0.1)
    assert figures["inverse"][key] == pytest.approx(0.0, abs=0.1)
    # n workers that are always busy: T (n - 1) / (T + n - 1) for every schedule
    assert figures["tau_avg"] == pytest.approx([7.0, 7.0], abs=0.1)
    assert figures["tau_max"][1] > 10 * figures["tau_max"][0]


def test_speed_up_is_linear_where_noise_decides() -> None:
    figures = _figures("speedup")["adpsgd"]
    assert figures["exponent_of_time_c_1"] == pytest.approx(-1, abs=0.1)


def test_stale_replicas_part_early() -> None:
    figures = _figures("staleness")["quadratic"]
    assert figures["s_avg"][1] > 3 * figures["s_avg"][0]
    assert figures["apart_early"][1] > 1.3


def test_bias_of_asgd_has_its_closed_form() -> None:
    rows = {(row["clients"], row["rule"]): row for row in _rows("heterogeneous")}
    free = rows["idle", "constant"]
    assert free["bias"] == pytest.approx(free["by_speeds"], rel=0.15)
    assert rows["idle", "inverse"]["bias"] == pytest.approx(
        rows["idle", "inverse"]["by_steps"], rel=0.15
    )
    assert rows["uniform", "constant"]["bias"] < free["bias"] / 3
    assert rows["uniform", "inverse"]["weight"] < 0.5 * rows["uniform", "constant"]["weight"]


def test_consensus_distance_of_swarm_grows_like_h_by_noise_and_h_squared_by_drift() -> None:
    figures = _figures("disagreement")
    assert figures["noise"]["H"]["complete"] == pytest.approx(1, abs=0.3)
    assert figures["drift"]["H"]["complete"] == pytest.approx(2, abs=0.3)
    for row in _rows("disagreement"):
        assert 0.9 < row["H=4 / predicted"] < 1.6


def test_the_linear_analysis_is_that_of_random_pair_averages() -> None:
    for size in (2, 7):  # one initiator's noise, averaged by all equally
        complete = linear_theory.laplacian("complete", size, None, 0)
        assert linear_theory.noise(complete) == pytest.approx(((size - 1) / size) ** 2)
    ring = linear_theory.laplacian("ring", 6, None, 0)
    rng = np.random.default_rng(1)
    x = np.zeros((6, 400))  # columns are independent runs of the same meetings' law
    total = 0.0
    for event in range(4000):
        i = int(rng.integers(6))
        j = (i + (1 if rng.random() < 0.5 else -1)) % 6
        x[i] = x[j] = (x[i] + x[j]) / 2
        x[i] += rng.normal(size=400)
        x -= x.mean(0)
        total += np.square(x).sum() / x.size if event >= 1000 else 0.0
    assert linear_theory.noise(ring) == pytest.approx(total / 3000, rel=0.05)
    minima = rng.normal(size=(6, 3))
    models, pull = linear_theory.drift(ring, 0.1, minima - minima.mean(0))
    np.testing.assert_allclose(ring @ models / 2, 0.1 * pull, atol=1e-12)


def test_local_steps_cost_swarm_more_than_bits() -> None:
    figures = _figures("quantization")
    assert figures["excess_ranks_over_least_H"][1] > 2
    assert max(np.abs(figures["points_lost_by_bits"]["lattice8"])) < 0.3


def test_late_gradients_are_seen_by_all_decentralized_algorithms() -> None:
    for row in _rows("adaptive"):
        assert row["delay max"] > 50, "10 times slower: some 70 gradients of 7 others"
        assert 0.05 < row["late"] < 0.3
        assert np.isfinite(row["settled"])


@pytest.mark.parametrize("name", list(studies.STUDIES))
def test_a_study_draws_and_says_what_it_asks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    studies.find(name).draw(_samples(name), tmp_path / "a.png")
    for axes in drawn[0].axes:
        assert axes.lines and axes.get_xlabel() and axes.get_ylabel()
    words = importlib.import_module(f"mpi_dasgd.studies.{name}").__doc__ or ""
    for part in ("Question: ", "Paper: ", "Setting: ", "Expected: "):
        assert f"\n{part}" in words
    assert studies.table(_rows(name))
    config.Config.model_validate_json(_samples(name).attributes["config_json"])


def test_samples_are_read_back_as_they_were(tmp_path: Path) -> None:
    for name in ("adaptive", "speedup"):
        samples = _samples(name)
        back = read(write(samples, tmp_path / "a.h5"))
        assert (back.name, list(back.axes)) == (name, list(samples.axes))
        assert back.variables == samples.variables
        for key, axis in samples.axes.items():
            np.testing.assert_array_equal(back[key], samples[key])
            assert back.axes[key][1:] == axis[1:]
        for key in samples.arrays:
            np.testing.assert_array_equal(back[key], samples[key])
        assert back.attributes == samples.attributes
        assert studies.find(name).summary(back)[1] == studies.find(name).summary(samples)[1]


def test_xarray_opens_samples(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    path = write(_samples("speedup"), tmp_path / "a.h5")
    with xarray.open_dataset(path, engine="h5netcdf", group="speedup") as data:
        assert data["time"].dims == ("algorithm", "ranks", "factor", "seed")
        assert data["time"].attrs["units"] == "1"
        assert data["ranks"].values.tolist() == [1, 16]


def test_a_study_repeats_bit_for_bit() -> None:
    again = studies.find("heterogeneous").samples(1, True)
    for key, values in _samples("heterogeneous").arrays.items():
        np.testing.assert_array_equal(again[key], values)


def test_the_command_writes_samples_and_picture_and_draws_them_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert cli.main(["study", "heterogeneous", "--quick", "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["study"] == "heterogeneous" and report["rows"] and report["figures"]
    assert Path(report["picture"]).read_bytes()[1:4] == b"PNG"
    import h5py

    with h5py.File(report["samples"]) as file:
        assert {"numpy", "host", "command"} <= set(file.attrs)
    again = ["study", "heterogeneous", "--from", report["samples"], "--out", str(tmp_path)]
    assert cli.main(again) == 0
    assert "bias_free_constant_over_speeds" in capsys.readouterr().out
    assert cli.main(["study", "delay", "--from", report["samples"]]) == 2
    assert "has the samples of study 'heterogeneous'" in capsys.readouterr().err


def test_without_a_name_all_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in studies.STUDIES)


def test_bad_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "slowdwon"]) == 2
    assert "did you mean 'slowdown'" in capsys.readouterr().err
    assert cli.main(["study", "delay", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["study", "delay", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err
    assert cli.main(["study", "delay", "--from", str(tmp_path / "file")]) == 2
    assert "expected the samples of `mpi-dasgd study`" in capsys.readouterr().err


def test_without_matplotlib_the_samples_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(_samples("speedup"), tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "mpi_dasgd.studies.plotting", raising=False)
    monkeypatch.delattr(studies, "plotting", raising=False)
    assert cli.main(["study", "speedup", "--from", str(path), "--out", str(tmp_path)]) == 2
    assert "mpi_dasgd[report]" in capsys.readouterr().err


def test_studies_load_plots_only_when_needed() -> None:
    for path in Path(studies.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # of the module itself, not of its functions
            if isinstance(node, ast.Import | ast.ImportFrom) and path.stem != "plotting":
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not {"plotting", "matplotlib", "h5py", "mpi_dasgd.studies.plotting"} & names


def test_when_a_curve_reaches_a_level_and_when_it_stays_below() -> None:
    x = np.arange(5.0)
    values = np.array([100.0, 1.0, 100.0, 1.0, 1.0])
    assert trajectory.first_time_below(x, values, 10.0) == pytest.approx(0.5)
    assert trajectory.time_until_stays_below(x, values, 10.0) == pytest.approx(2.5)
    assert trajectory.time_until_stays_below(x, values, 0.5) is None
    assert trajectory.first_time_below(x, values, 0.5) is None
    assert trajectory.time_until_stays_below(x, np.array([1, 1, 1, 1, np.nan]), 10.0) is None
    assert trajectory.first_time_below(x, values, 200.0) == 0


def test_a_trajectory_ends_early_and_leaves_out_gradients_that_come_too_late() -> None:
    keys = {
        "simulation.ranks": 4,
        "simulation.compute_time": "constant",
        "simulation.slow_ranks": [-1],
        "simulation.slow_factor": 100,
        "budget.samples": 300,
    }
    run = trajectory.simulate_trajectory(trajectory.configure(keys), 30)
    # 3 gradients per unit of time; the slow one, at 100, is the 301st and not waited for
    assert run.counts[-1] == 300 and run.times[-1] == pytest.approx(100)
    assert len(run.means) == len(run.counts) == len(run.grad_norm_sq) == 11
    first = run.distances[0]
    short = trajectory.simulate_trajectory(trajectory.configure(keys), 30, until=first / 2)
    assert short.distances[-1] <= first / 2 < short.distances[-2]


def test_exponents_and_spreads() -> None:
    assert loglog_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert loglog_slope([1, 2, 4], [3, 12, np.inf]) == pytest.approx(2)
    assert loglog_slope([1], [3]) is None
    least, middle, largest = spread(np.array([[1.0, 3.0, np.nan]]))
    assert (least[0], middle[0], largest[0]) == (1, 3, np.inf)
