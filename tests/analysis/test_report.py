"""The report: figures that can be checked by hand, and a page that stands on its own."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from matplotlib.figure import Figure

from mpi_dasgd.analysis import panels
from mpi_dasgd.analysis.load import Run, load_run
from mpi_dasgd.analysis.page import write_report
from mpi_dasgd.analysis.table import lines, report_json, summary_table
from mpi_dasgd.analysis.verdict import common_target, labels, shorten, verdict
from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.results import consolidate, results_path
from mpi_dasgd.storage.runfile import RunFile, rank_path
from mpi_dasgd.storage.schema import TABLES, UNKNOWN_AGE, EvaluationRow, ExchangeRow, TrainRow
from tests.storage.test_results import MILESTONES, write_run

SUMMARY_KEYS = {
    *("name", "algorithm", "codec", "ranks", "samples", "wall_s", "samples_per_s", "status"),
    *("test_accuracy", "worst_rank_accuracy", "staleness_mean", "staleness_max", "seed"),
    *("bytes_per_exchange", "consensus_distance", "topology"),
}


def write_tiny_run(directory: Path, consensus: bool = True) -> None:
    """Two ranks with round numbers: 300 samples in 3 s, five exchanges, two milestones."""
    for rank, steps in enumerate((2, 1)):
        record = RunFile(
            rank_path(directory, rank),
            rank=rank,
            size=2,
            attributes={"algorithm": "swarm", "codec": "lattice8", "seed": 4, "topology": "ring"},
        )
        for step in range(1, steps + 1):
            seconds = step * 1.5 if rank == 0 else 2.0
            delay, factor = (2, 0.5) if (rank, step) == (0, 2) else (0, 1.0)
            record.append(
                TrainRow(
                    step=step,
                    time_s=seconds,
                    samples=100 * step,
                    total_samples=150 * step,
                    loss=0.5,
                    learning_rate=0.1,
                    compute_s=1,
                    exchange_s=0.4,
                    wait_s=0.1,
                    delay=delay,
                    delay_factor=factor,
                )
            )
        for milestone in range(2):
            accuracy = (0.80, 0.90)[milestone] - 0.10 * rank
            time = (1.0, 2.5)[milestone] + 0.25 * rank
            record.append(
                EvaluationRow(
                    milestone=milestone,
                    step=1,
                    time_s=time,
                    samples=50,
                    total_samples=100 * (milestone + 1),
                    test_loss=0.3,
                    test_accuracy=accuracy,
                )
            )
        if rank == 0:
            record.append(
                ExchangeRow(
                    step=1,
                    time_s=1.0,
                    partner=1,
                    kind=0,
                    partner_step=3,
                    age_steps=-2,
                    age_s=0.1,
                    bytes=1000,
                    retries=0,
                    distance=0.5,
                    rejected=0,
                    set_staleness=-1,
                )
            )
            record.append(
                ExchangeRow(
                    step=2,
                    time_s=2.0,
                    partner=1,
                    kind=0,
                    partner_step=1,
                    age_steps=5,
                    age_s=0.2,
                    bytes=3000,
                    retries=1,
                    distance=0.5,
                    rejected=0,
                    set_staleness=-1,
                )
            )
            record.append(
                ExchangeRow(
                    step=2,
                    time_s=2.1,
                    partner=-1,
                    kind=2,
                    partner_step=-1,
                    age_steps=UNKNOWN_AGE,
                    age_s=np.nan,
                    bytes=0,
                    retries=4,
                    distance=0.5,
                    rejected=0,
                    set_staleness=-1,
                )
            )
        else:
            record.append(
                ExchangeRow(
                    step=1,
                    time_s=1.1,
                    partner=0,
                    kind=1,
                    partner_step=0,
                    age_steps=3,
                    age_s=0.2,
                    bytes=500,
                    retries=0,
                    distance=0.5,
                    rejected=0,
                    set_staleness=-1,
                )
            )
            record.append(
                ExchangeRow(
                    step=1,
                    time_s=1.2,
                    partner=0,
                    kind=3,
                    partner_step=0,
                    age_steps=4,
                    age_s=0.3,
                    bytes=900,
                    retries=0,
                    distance=np.nan,
                    rejected=0,
                    set_staleness=6,
                )
            )  # a gradient
        record.close("finished", {"bytes_sent": 2000 * (1 - rank) + 4000})
    table = {
        "total_samples": [100, 200],
        "time_s": [1.25, 2.75],
        "mean_test_loss": [0.4, 0.25],
        "mean_test_accuracy": [0.85, 0.95],
        "worst_test_accuracy": [0.70, 0.80],
        "best_test_accuracy": [0.80, 0.90],
        "consensus_distance": [2.0, 0.5],
        "consensus_relative": [0.2, 0.05],
    }
    arrays = {name: np.array(values) for name, values in table.items()}
    if consensus:
        consolidate(directory, arrays)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """An asynchronous quantized run, an unquantized one and an all-reduce."""
    folder = tmp_path_factory.mktemp("runs")
    consolidate(folder / "swarm-lattice8", write_run(folder / "swarm-lattice8"))
    ad_psgd = write_run(folder / "ad-psgd", algorithm="adpsgd", codec="none", seed=2, gap=0.008)
    consolidate(folder / "ad-psgd", ad_psgd)
    allreduce = write_run(
        folder / "allreduce", algorithm="allreduce", codec="none", gap=0.0, wait_s=0.0005
    )
    consolidate(folder / "allreduce", allreduce)
    return [load_run(folder / name) for name in ("swarm-lattice8", "ad-psgd", "allreduce")]


def test_summary_by_hand(tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "tiny")
    summary = load_run(tmp_path / "tiny").summary()
    assert summary.keys() >= SUMMARY_KEYS
    expected = {
        "name": "tiny",
        "algorithm": "swarm",
        "codec": "lattice8",
        "topology": "ring",
        "seed": 4,
        "status": "finished",
        "ranks": 2,
        "ranks_lost": [],
        "samples": 300,
        "wall_s": 3.0,
        "samples_per_s": 100.0,
        "train_loss": 0.5,
        "test_loss": 0.25,
        "test_accuracy": 0.95,
        "worst_rank_accuracy": 0.80,
        "staleness_mean": (0 + 5 + 3 + 4) / 4,
        "staleness_max": 5,
        "delay_mean": 2 / 3,
        "delay_max": 2,
        "delay_factor_mean": 2.5 / 3,
        "exchanges": 3,
        "bytes_per_exchange": 1800.0,
        "bytes_sent": 10_000,
        "consensus_distance": 0.5,
        "consensus_relative": 0.05,
        "task": None,
    }
    assert summary == expected


def test_seconds_to_accuracy(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    run = load_run(tmp_path)
    assert run.seconds_to(0.80) == (1.25, 2.75)
    assert run.seconds_to(0.90) == (2.75, None)
    assert run.seconds_to(0.99) == (None, None)


def test_directory_and_file_are_the_same_run(runs: list[Run]) -> None:
    for run in runs:
        assert load_run(results_path(run.path)).report() == run.report()


def test_without_results_the_rank_files_are_read(tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "killed", consensus=False)
    run = load_run(tmp_path / "killed")
    summary = run.summary()
    # The mean model was never measured; the worst rank is known from the ranks' own evaluations.
    assert summary["test_accuracy"] is None
    assert summary["consensus_distance"] is None
    assert summary["worst_rank_accuracy"] == pytest.approx(0.80)
    assert run.seconds_to(0.75) == (None, 2.75)
    assert summary["samples"] == 300


@pytest.mark.slow
def test_a_live_run_reports(tmp_path: Path) -> None:
    record = RunFile(rank_path(tmp_path, 0), rank=0, size=2, attributes={"algorithm": "alone"})
    record.append(TrainRow(**{column.name: 1 for column in TABLES["train"]}))
    record.flush()
    code = (
        "import sys; from mpi_dasgd.analysis.load import load_run;"
        "s = load_run(sys.argv[1]).summary(); print(s['status'], s['ranks_lost'], s['samples'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == "running [1] 1"
    picture, page = write_report([load_run(tmp_path)], tmp_path / "report")
    assert picture.stat().st_size > 10_000
    text = page.read_text()
    assert "lost the files of rank 1" in text
    assert "has not ended" in text
    record.close("finished", {})


def test_what_was_not_measured_is_none(runs: list[Run]) -> None:
    summary = runs[2].summary()
    assert summary["algorithm"] == "allreduce"
    for key in ("staleness_mean", "staleness_max", "bytes_per_exchange", "exchanges"):
        assert summary[key] is None


def test_json_is_json(runs: list[Run]) -> None:
    report = report_json(runs)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [entry["algorithm"] for entry in report] == ["swarm", "adpsgd", "allreduce"]
    assert [rank["rank"] for rank in report[0]["per_rank"]] == [0, 1, 2, 3]
    assert len(report[0]["milestones"]["time_s"]) == MILESTONES
    assert report[0]["provenance"]["mpi_library"] == "MPICH 5.0"
    assert report[0]["config"]["batch"] == 32


@pytest.mark.parametrize("count", [1, 3, 9])
def test_table_fits_and_has_units(runs: list[Run], count: int) -> None:
    many = (runs * 3)[:count]
    text = summary_table(many)
    assert max(map(len, text.splitlines())) <= 100
    for head in ("wall time [s]", "throughput [samples/s]", "accuracy, worst rank [%]"):
        assert head in text
    speed = runs[0].summary()["samples_per_s"]
    assert f"{speed:,.0f}" in text
    assert text.count(f"{speed:,.0f}") == max(1, count // 3)


def test_best_is_marked_where_one_end_is_better(runs: list[Run]) -> None:
    found = {line.name: line for line in lines(runs)}
    speeds = [run.summary()["samples_per_s"] for run in runs]
    assert found["throughput"].best == int(np.argmax(speeds))
    assert found["samples"].best is None
    assert found["accuracy, worst rank"].best == 2
    assert all(line.best is None for line in lines(runs[:1]))


def test_verdict_names_the_first(runs: list[Run]) -> None:
    target = common_target(runs)
    assert target == 0.96
    times = [run.seconds_to(target).worst or np.inf for run in runs]
    text = verdict(runs)
    assert text.startswith(f"{runs[int(np.argmin(times))].name} is the first with 96 %")
    assert f"({max(times) / min(times):.1f}x)" in text
    assert "4 ranks processed" in verdict(runs[:1])


def test_verdict_tells_what_went_wrong(tmp_path: Path) -> None:
    write_run(tmp_path / "a", step_s=(0.001, 0.001), samples=4_000, close={1: "failed"})
    consolidate(tmp_path / "a")
    assert "The run failed: at least one rank" in verdict([load_run(tmp_path / "a")])
    write_run(tmp_path / "b", step_s=(0.001, 0.001), samples=4_000)
    rank_path(tmp_path / "b", 1).unlink()
    consolidate(tmp_path / "b")
    text = verdict([load_run(tmp_path / "b")])
    assert "lost the files of rank 1" in text
    write_run(tmp_path / "c", step_s=(0.001, 0.001), samples=4_000, close={1: "running"})
    consolidate(tmp_path / "c")
    assert "The run ended without all of its ranks." in verdict([load_run(tmp_path / "c")])


def test_labels_are_distinct(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_run(tmp_path / folder / "run", step_s=(0.001,), samples=2_000)
    first, second = (load_run(tmp_path / folder / "run") for folder in ("x", "y"))
    assert labels([first, second]) == ["x/run", "y/run"]
    assert len(set(labels([first, first, second]))) == 3
    assert labels([first]) == ["run"]


def test_long_names_stay_distinct() -> None:
    names = ["swarm-lattice8-of-tuesday", "swarm-lattice8-of-wednesday", "short"]
    assert shorten(names, 16) == ["…ice8-of-tuesday", "…e8-of-wednesday", "short"]
    assert shorten(["first-of-many-runs", "other-of-many-runs"], 8) == ["first-o…", "other-o…"]


class _Page(HTMLParser):
    """Collects what a page would load from elsewhere, its images and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value:
                (self.images if value.startswith("data:") else self.links).append(value)


@pytest.mark.slow
def test_page_stands_alone(runs: list[Run], tmp_path: Path) -> None:
    picture, page = write_report(runs, tmp_path / "new" / "folder")
    assert picture == tmp_path / "new" / "folder" / "report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.links == []
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert not re.search(r"@import|url\(", text)
    assert len(parsed.images) == 11
    for image in parsed.images:
        svg = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert parsed.tags.count("details") == 3
    assert verdict(runs) in text
    assert "MPICH 5.0" in text
    assert "&#34;learning_rate&#34;: 0.05" in text


@pytest.mark.slow
def test_page_escapes_names_and_says_what_is_missing(tmp_path: Path) -> None:
    write_run(
        tmp_path / "run",
        algorithm="allreduce",
        wait_s=0.001,
        samples=4_000,
        attributes={"name": "<script>alert(1)</script>"},
    )
    consolidate(tmp_path / "run")
    _, page = write_report([load_run(tmp_path / "run")], tmp_path)
    text = page.read_text()
    assert "<script>" not in text
    assert "Not recorded by these runs: test loss, staleness, delay, consensus distance." in text


@pytest.mark.parametrize(
    ("panel", "expected"),
    [
        (panels.consensus, [0.2, 0.05]),
        (panels.test_loss_by_time, [0.4, 0.25]),
        (panels.traffic, [0, 5400]),
        (panels.loss_by_samples, [0.5, 0.5]),
    ],
)
def test_panels_draw_the_values(tmp_path: Path, panel: panels.Panel, expected: list[float]) -> None:
    write_tiny_run(tmp_path)
    axes = Figure().subplots()
    assert panel(axes, [load_run(tmp_path)], ["tiny"])
    values = np.asarray(axes.lines[0].get_ydata())
    assert [values[0], values[-1]] == expected
    assert axes.get_xlabel()
    assert axes.get_ylabel()


@pytest.mark.parametrize(
    ("panel", "lowest", "expected"),
    [
        (panels.staleness, -2, [1 / 4, 0, 0, 0, 0, 1 / 4, 1 / 4, 1 / 4]),  # -2, 3, 4, 5 steps
        (panels.delay, 0, [2 / 3, 0, 1 / 3]),
    ],
)
def test_histograms_have_a_bar_a_number(
    tmp_path: Path, panel: panels.Panel, lowest: int, expected: list[float]
) -> None:
    write_tiny_run(tmp_path)
    axes = Figure().subplots()
    assert panel(axes, [load_run(tmp_path)], ["tiny"])
    shares, edges, _ = axes.patches[0].get_data()
    assert edges[0] == lowest - 0.5
    np.testing.assert_allclose(shares[: len(expected)], expected)
    assert sum(shares) == pytest.approx(1)


def test_traffic_adds_up_over_the_ranks(tmp_path: Path) -> None:
    write_tiny_run(tmp_path)
    axes = Figure().subplots()
    panels.traffic(axes, [load_run(tmp_path)], ["tiny"])
    seconds, moved = (np.asarray(values) for values in axes.lines[0].get_data())
    assert np.interp(1.5, seconds, moved) == 2400


@pytest.mark.slow
def test_a_regression_without_accuracy_reports(tmp_path: Path) -> None:
    consensus = write_run(tmp_path, step_s=(0.001, 0.001), samples=4_000)
    for name in list(consensus):
        if "accuracy" in name:
            consensus[name] = np.full(MILESTONES, np.nan)
    consolidate(tmp_path, consensus)
    run = load_run(tmp_path)
    assert run.summary()["test_accuracy"] is None
    assert common_target([run]) is None
    assert "is the fastest with" in verdict([run, run])
    assert "accuracy" not in summary_table([run])
    write_report([run, run], tmp_path / "out")


def _nothing(path: Path) -> Path:
    return path / "nothing"


def _empty_directory(path: Path) -> Path:
    return path


def _other_hdf5(path: Path) -> Path:
    with h5py.File(path / "other.h5", "w") as file:
        file["x"] = 1
    return path / "other.h5"


def _text(path: Path) -> Path:
    (path / "results.h5").write_text("no HDF5")
    return path


def _no_records(path: Path) -> Path:
    RunFile(rank_path(path, 0), rank=0, size=1, attributes={}).close("finished", {})
    return path


def _one_rank_file(path: Path) -> Path:
    write_run(path, step_s=(0.001,), samples=2_000)
    return rank_path(path, 0)


def _flipped_byte(path: Path) -> Path:
    write_run(path, step_s=(0.001,), samples=2_000)
    results = consolidate(path)
    with h5py.File(results) as file:
        chunk = file["train/loss"].id.get_chunk_info(0)
    content = bytearray(results.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    results.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "found nothing there"),
        (_empty_directory, "found neither results.h5 nor ranks/"),
        (_other_hdf5, "another HDF5 file"),
        (_text, "damaged"),
        (_no_records, "no records yet"),
        (_one_rank_file, "file of one rank; give the run directory"),
        (_flipped_byte, "results.h5.*damaged"),
    ],
)
def test_a_path_that_is_no_run_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_run(path)
    assert str(path) in str(error.value)


def test_a_report_of_no_run_is_refused() -> None:
    for function in (summary_table, lambda runs: write_report(runs, "unused")):
        with pytest.raises(UserError, match="at least one run"):
            function([])
    assert not Path("unused").exists()


@pytest.mark.slow
def test_analysis_imports_neither_torch_nor_mpi(runs: list[Run], tmp_path: Path) -> None:
    code = (
        "import sys; from mpi_dasgd.analysis.page import write_report;"
        "from mpi_dasgd.analysis.load import load_run;"
        "write_report([load_run(sys.argv[1])], sys.argv[2]);"
        "bad = {'torch', 'mpi4py', 'cupy', 'scipy', 'xxhash', 'matplotlib.pyplot'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    arguments: list[Any] = [sys.executable, "-c", code, runs[0].path, tmp_path]
    subprocess.run(arguments, timeout=120, check=True)
