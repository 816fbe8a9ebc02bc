"""`bench quality`: errors and bias are as the codecs promise; the report fits the raw samples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd import bench
from mpi_dasgd.bench import detection, quality
from mpi_dasgd.bench.bias import measure_bias
from mpi_dasgd.bench.codec_error import METHODS, measure_errors, random_models
from mpi_dasgd.bench.gossip import PHASES, RANKS, CodecSetting, measure_gossip
from mpi_dasgd.bench.sample_store import read_samples
from mpi_dasgd.codecs import CODECS
from mpi_dasgd.errors import MpiDasgdError
from mpi_dasgd.kernels import lattice
from mpi_dasgd.kernels.encoded import BITS, EncodedVector

COUNTS = ("failing", "sound", "undetected", "false_alarms")


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int], float]:
    """Errors by method and power, with 10^-power the distance of the models."""
    return {
        (result.method, power): result.error
        for power in (1, 2, 3, 4, 5)
        for result in measure_errors(10.0**-power, 64, 0)
    }


def test_lattice_errors_are_relative_to_the_distance(errors: dict[tuple[str, int], float]) -> None:
    for method, expected in {
        "lattice4": 0.3,
        "lattice8": 0.017,
        "lattice8 merge": 0.017,
        "lattice8 merge subtracted": 0.012,
    }.items():
        measured = [errors[method, power] for power in (1, 2, 3, 4)]
        assert measured == pytest.approx([expected] * 4, rel=0.1), method
    for power in (1, 2, 3, 4):
        lattice8 = errors["lattice8", power]
        assert errors["lattice16", power] < lattice8 / 4
        assert lattice8 < errors["lattice8 power of two", power] < 2 * lattice8
        assert errors["lattice8 one scale", power] > 2 * lattice8


def test_other_codecs_errors_are_relative_to_the_model(
    errors: dict[tuple[str, int], float],
) -> None:
    for method in ("bf16", "fp16", "qsgd8"):
        ratios = [errors[method, power + 1] / errors[method, power] for power in (2, 3, 4)]
        assert ratios == pytest.approx([10] * 3, rel=0.05), method
        assert errors[method, 1] < 1 < errors[method, 5], method


def test_errors_cover_every_codec_and_the_final_distance() -> None:
    assert set(CODECS) < set(METHODS)
    results = {result.method: result for result in measure_errors(1e-3, 16, 1)}
    assert list(results) == list(METHODS)
    for result in results.values():
        assert result.rejected == 0
        if "merge" in result.method:
            # Both models err, each by half, and independently.
            assert result.ends == pytest.approx(result.error / 2**0.5, rel=0.05)
        elif result.method != "none":
            assert result.ends == pytest.approx(result.error, rel=0.05)


def test_random_models_have_the_given_distance() -> None:
    x, y = random_models(1e-3, 32, 5)
    assert np.sqrt(np.square(x.astype(np.float64) - y).mean()) == pytest.approx(1e-3, rel=1e-3)


def test_detection_covers_every_combination() -> None:
    blocks = list(detection.measure_detection(24 * 32, 3))
    assert len(blocks) == 24
    combinations = {(block.bits, block.law, block.operation) for block in blocks}
    assert combinations == {
        (bits, law, operation)
        for bits in BITS
        for law in ("gauss", "laplace")
        for operation in ("exchange", "merge")
    }
    assert all(block.failing + block.sound == 32 for block in blocks)
    assert any(block.single for block in blocks)
    counts = detection.count_detections(24 * 32, 3)
    assert counts["failing"] + counts["sound"] == 24 * 32
    assert counts["failing"] > 100 < counts["sound"]
    assert counts["undetected"] == counts["false_alarms"] == 0


@pytest.mark.parametrize(("accepts", "wrong"), [(True, "undetected"), (False, "false_alarms")])
def test_detection_finds_a_wrong_check(
    accepts: bool, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchange_with_wrong_check(
        y: np.ndarray, partner_model: EncodedVector, weight: float, reply: None, stats: np.ndarray
    ) -> None:
        stats["rejected"] = not accepts

    monkeypatch.setattr(lattice, "exchange", exchange_with_wrong_check)
    blocks = [
        block for block in detection.measure_detection(12 * 32, 3) if block.operation == "exchange"
    ]
    counts = {name: sum(getattr(block, name) for block in blocks) for name in COUNTS}
    assert counts[wrong] == counts["failing" if accepts else "sound"] > 0


def test_detection_refuses_points_out_of_range() -> None:
    scales = np.full(1, 1e-9, np.float32)
    with pytest.raises(MpiDasgdError, match="beyond the range"):
        detection._points(np.ones((1, 1024), np.float32), scales, None)


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased() -> None:
    results = {result.method: result for result in measure_bias(300, 0)}
    assert set(results) == {
        *(f"{name} exchange" for name in ("qsgd8", "lattice4", "lattice8", "lattice16")),
        *(f"lattice{bits} merge" for bits in BITS),
    }
    for result in results.values():
        assert abs(result.z) < 4.5, result
        # Almost as small as for independent elements.
        assert result.deviation < 2 / (300 * 16384) ** 0.5, result


@pytest.mark.slow
def test_gossip_compares_with_the_codec_none() -> None:
    settings = [
        CodecSetting("lattice8", 2.0, 0.9),
        CodecSetting("fp16"),
        CodecSetting("lattice8", 2.0, 0.9, 0.25),
    ]
    rows = list(measure_gossip("gauss", settings, 12, 0))
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
def test_the_report_follows_from_the_raw_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "DISTANCES", [1e-2, 1e-3])
    monkeypatch.setattr(quality, "PAIR_BUCKETS", 8)
    monkeypatch.setattr(quality, "LATTICE_SETTINGS", [CodecSetting("lattice8", 2.0, 0.9)])
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
                for key, value in row.items():
                    stored = columns[key][number]
                    assert value == stored or (value is None and math.isnan(stored)), (name, key)
    columns, _ = read_samples(report["samples"]["detection"])
    assert columns["failing"].sum() == report["detection"][-1]["failing"]

    assert (
        bench.run("quality", [*sizes, "--parts", "errors", "gossip", "--out", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    assert "lattice16" in text and "disagreement" in text and "undetected" not in text
    assert text.count("raw samples: ") == 2
