"""`bench quality`: the figures have the shape that the codecs promise, and follow from the raw samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd import bench
from mpi_dasgd.bench import detection, quality
from mpi_dasgd.bench.bias import biases
from mpi_dasgd.bench.codec_error import METHODS, errors, models
from mpi_dasgd.bench.gossip import PHASES, RANKS, Setting, gossip
from mpi_dasgd.bench.sample_store import read_samples
from mpi_dasgd.codecs import CODECS
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.kernels import lattice
from mpi_dasgd.kernels.encoded import BITS, EncodedVector

NAMES = ("failing", "sound", "undetected", "false_alarms")


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, int], float]:
    """Errors by method and negative power of ten of the distance."""
    return {
        (error.method, power): error.error
        for power in (1, 2, 3, 4, 5)
        for error in errors(10.0**-power, 64, 0)
    }


def test_errors_of_the_lattice_follow_the_distance(table: dict[tuple[str, int], float]) -> None:
    for method, expected in {
        "lattice4": 0.3,
        "lattice8": 0.017,
        "lattice8 merge": 0.017,
        "lattice8 merge subtracted": 0.012,
    }.items():
        found = [table[method, power] for power in (1, 2, 3, 4)]
        assert found == pytest.approx([expected] * 4, rel=0.1), method
    for power in (1, 2, 3, 4):
        eight = table["lattice8", power]
        assert table["lattice16", power] < eight / 4
        assert eight < table["lattice8 power of two", power] < 2 * eight
        assert table["lattice8 one scale", power] > 2 * eight


def test_errors_of_the_others_follow_the_size(table: dict[tuple[str, int], float]) -> None:
    for method in ("bf16", "fp16", "qsgd8"):
        ratios = [table[method, power + 1] / table[method, power] for power in (2, 3, 4)]
        assert ratios == pytest.approx([10] * 3, rel=0.05), method
        assert table[method, 1] < 1 < table[method, 5], method


def test_errors_are_of_every_codec_and_say_how_the_pair_ends() -> None:
    assert set(CODECS) < set(METHODS)
    found = {error.method: error for error in errors(1e-3, 16, 1)}
    assert list(found) == list(METHODS)
    for error in found.values():
        assert error.rejected == 0
        if "merge" in error.method:  # both sides err, each by half, and independently
            assert error.ends == pytest.approx(error.error / 2**0.5, rel=0.05)
        elif error.method != "none":
            assert error.ends == pytest.approx(error.error, rel=0.05)


def test_models_have_the_distance_that_is_asked_for() -> None:
    x, y = models(1e-3, 32, 5)
    assert np.sqrt(np.square(x.astype(np.float64) - y).mean()) == pytest.approx(1e-3, rel=1e-3)


def test_detection_counts_every_kind() -> None:
    cases = list(detection.cases(24 * 32, 3))
    assert len(cases) == 24
    kinds = {(case.bits, case.law, case.operation) for case in cases}
    assert kinds == {
        (b, law, op) for b in BITS for law in ("gauss", "laplace") for op in ("exchange", "merge")
    }
    assert all(case.failing + case.sound == 32 for case in cases)
    assert any(case.single for case in cases)
    sums = quality.detection(24 * 32, 3)
    assert sums["failing"] + sums["sound"] == 24 * 32 and sums["failing"] > 100 < sums["sound"]
    assert sums["undetected"] == sums["false_alarms"] == 0


@pytest.mark.parametrize(("sound", "wrong"), [(True, "undetected"), (False, "false_alarms")])
def test_detection_sees_a_check_that_lies(
    sound: bool, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(
        y: np.ndarray, theirs: EncodedVector, weight: float, reply: None, found: np.ndarray
    ) -> None:
        found["rejected"] = not sound

    monkeypatch.setattr(lattice, "exchange", lying)
    cases = [case for case in detection.cases(12 * 32, 3) if case.operation == "exchange"]
    lies = {name: sum(getattr(case, name) for case in cases) for name in NAMES}
    assert lies[wrong] == lies["failing" if sound else "sound"] > 0


def test_detection_refuses_points_out_of_range() -> None:
    scales = np.full(1, 1e-9, np.float32)
    with pytest.raises(MpiDasgdError, match="beyond the range"):
        detection._points(np.ones((1, 1024), np.float32), scales, None)


@pytest.mark.slow
def test_rounding_at_random_is_without_bias() -> None:
    found = {bias.method: bias for bias in biases(300, 0)}
    assert set(found) == {
        *(f"{name} exchange" for name in ("qsgd8", "lattice4", "lattice8", "lattice16")),
        *(f"lattice{bits} merge" for bits in BITS),
    }
    for bias in found.values():
        assert abs(bias.z) < 4.5, bias
        assert bias.deviation < 2 / (300 * 16384) ** 0.5, bias  # as of independent elements


@pytest.mark.slow
def test_gossip_compares_with_the_codec_none() -> None:
    settings = [Setting("lattice8", 2.0, 0.9), Setting("fp16"), Setting("lattice8", 2.0, 0.9, 0.25)]
    rows = list(gossip("gauss", settings, 12, 0))
    assert [row.phase for row in rows[:: len(rows) // len(PHASES)]] == list(PHASES)
    for row in rows:
        if row.codec == "none":
            assert row.apart == 1 and row.rejected == 0 and row.error < 1e-2
    first = {(row.codec, row.weight): row for row in rows if row.phase == "1e-3"}
    assert first["lattice8", 0.5].apart == pytest.approx(1, abs=0.05)
    assert first["fp16", 0.5].apart == pytest.approx(1, abs=0.05)
    assert first["none", 0.25].disagreement > 1.2 * first["none", 0.5].disagreement
    assert 0 < first["lattice8", 0.5].error < 0.2
    # A jump of the learning rate leaves the models beyond the reach of the scale for a while.
    jump = {row.phase: row.rejected for row in rows if (row.codec, row.weight) == ("lattice8", 0.5)}
    assert jump["jump to 3e-3"] > 5 * jump["1e-4"]
    assert RANKS == 8


@pytest.mark.slow
def test_command_json_and_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "DISTANCES", [1e-2, 1e-3])
    monkeypatch.setattr(quality, "PAIR_BUCKETS", 8)
    monkeypatch.setattr(quality, "GRID", [Setting("lattice8", 2.0, 0.9)])
    sizes = ["--buckets", "400", "--messages", "5", "--rounds", "2", "--laws", "gauss"]
    sizes += ["--seed", "7"]
    assert bench.run("quality", [*sizes, "--json", "--out", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(quality.PARTS) <= set(report) and "kernels" in report
    assert [row["method"] for row in report["errors"]] == [*METHODS, *METHODS]
    assert report["detection"][-1]["bits"] == "all"
    for name in quality.PARTS:
        columns, attributes = read_samples(report["samples"][name])
        assert attributes["bench"] == name and attributes["seed"] == 7
        assert all(len(values) for values in columns.values())
        if name != "detection":
            for number, row in enumerate(report[name]):
                for key, shown in row.items():
                    kept = columns[key][number]
                    assert shown == kept or (shown is None and math.isnan(kept)), (name, key)
    columns, _ = read_samples(report["samples"]["detection"])
    assert columns["failing"].sum() == report["detection"][-1]["failing"]

    assert (
        bench.run("quality", [*sizes, "--parts", "errors", "gossip", "--out", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    assert "lattice16" in text and "disagreement" in text and "undetected" not in text
    assert text.count("raw samples: ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--buckets", "0"], "--buckets must be at least 1, got 0"),
        (["--messages", "1"], "--messages must be at least 2, got 1"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--parts", "error"], "--parts: 'error' is not known; did you mean 'errors'"),
        (["--laws", "cauchy"], "--laws: 'cauchy' is not known.*'gauss', 't3'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.run("quality", arguments)
