"""`bench training`: the order of the measurements, the shares, and real jobs."""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from mpi_dasgd import bench, launch
from mpi_dasgd.bench import ddp
from mpi_dasgd.bench.ddp import DdpTrainer, tcp_bytes_sent
from mpi_dasgd.bench.job_series import JobFailed
from mpi_dasgd.bench.measurement import (
    Result,
    common_windows,
    counts_per_window,
    measure,
)
from mpi_dasgd.bench.sample_store import read_samples
from mpi_dasgd.bench.training_plan import (
    FULL_PLAN,
    QUICK_PLAN,
    Measurement,
    Plan,
    Scenario,
    cores,
)
from mpi_dasgd.bench.training_report import (
    columns,
    require_same_start,
    shared_gpus,
    summarize,
    table,
)
from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.runfile import rank_path, read_run_file
from tests.support.late_stream import LateStream

# Parameters of the model of T1.
PARAMETERS = 9_930
SCENARIO = Scenario("T1", 2, "s10")
ENOUGH_SECONDS = (0.5, 4.0, 20.0)  # of training, until a busy machine has made some steps


def result(
    algorithm: str,
    repeat: int,
    rate: float,
    *,
    scenario: Scenario = SCENARIO,
    seconds_to_worst: float = 1.0,
    loss: float = 2.3,
) -> Result:
    """Return a result of 20 s: two ranks processed `rate` samples/s and used 10 s of CPU."""
    return Result(
        measurement=Measurement(scenario, algorithm, repeat, 22.0),
        edges=np.linspace(2.0, 22.0, 21),
        samples=np.outer([0.75, 0.25], np.full(20, rate)),
        cpu_s=np.full((2, 20), 0.25),
        busy_s=np.full(20, 0.75),
        bytes_per_step=np.nan if algorithm == "allreduce" else 100.0,
        seconds_to_mean=0.5,
        seconds_to_worst=seconds_to_worst,
        first_losses=(loss, 2.2),
    )


def test_plan_measures_every_combination_beside_its_reference() -> None:
    plan = Plan(["T1", "T3"], [2, 4], ["none", "c4"], ["ddp", "adpsgd", "ddp"], repeats=3)
    measurements = list(plan.measurements())
    assert len(measurements) == 2 * 2 * 2 * 3 * 3
    assert set(Counter((m.scenario, m.algorithm, m.repeat) for m in measurements).values()) == {1}
    for first in range(0, len(measurements), 3):
        group = measurements[first : first + 3]
        assert len({(m.scenario, m.repeat) for m in group}) == 1, "compared, but far apart in time"
        assert {m.algorithm for m in group} == {"alone", "ddp", "adpsgd"}
    positions = Counter((m.algorithm, n % 3) for n, m in enumerate(measurements))
    # Every algorithm is first, second and third equally often.
    assert set(positions.values()) == {8}


def test_full_and_quick_plan() -> None:
    assert [str(scenario) for scenario in Plan(**QUICK_PLAN).scenarios] == [
        "T1 n=2 none",
        "T1 n=2 s10",
    ]
    measurements = list(Plan(**FULL_PLAN).measurements())
    assert len(measurements) == 3 * 2 * 5 * 4 * 3
    for measurement in measurements:
        assert measurement.expected_seconds > measurement.seconds > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["T4"]}, "--tasks: 'T4' is not known"),
        ({"algorithms": ["adpsdg"]}, "did you mean 'adpsgd'"),
        ({"stragglers": ["x10"]}, "--stragglers: 'x10'"),
        ({"stragglers": ["s0"]}, "--stragglers: 's0'"),
        ({"ranks": [2, 1]}, "--ranks: needs 2 or more, got 1"),
        ({"repeats": 0}, "--repeats"),
        ({"seconds": 0.0}, "--seconds"),
    ],
)
def test_wrong_plans_are_refused(change: dict[str, object], message: str) -> None:
    good = {"tasks": ["T1"], "ranks": [2], "stragglers": ["none"], "algorithms": ["ddp"]}
    with pytest.raises(UserError, match=message):
        Plan(**{**good, "repeats": 1, **change})  # type: ignore[arg-type]


def test_configuration_of_a_measurement(tmp_path: Path) -> None:
    def config(task: str, straggler: str, algorithm: str, repeat: int = 0) -> Config:
        return Measurement(Scenario(task, 2, straggler), algorithm, repeat, 4.0).config(tmp_path)

    sleeping, busy = config("T1", "s10", "adpsgd").straggler, config("T1", "c4", "ddp").straggler
    assert (sleeping.distribution, sleeping.factor, sleeping.mode) == ("constant", 10, "sleep")
    assert (busy.distribution, busy.factor, busy.mode) == ("constant", 4, "busy")
    assert config("T1", "none", "alone").straggler.distribution == "none"
    fused = [config("T1", "none", name).optimizer.fused for name in ("alone", "adpsgd")]
    assert fused == ["off", "auto"], "alone is torch's own loop"
    assert config("T1", "none", "alone").evaluation.count == 200, "one in 0.02 s"
    assert config("T2", "none", "alone").evaluation.count == 1, "noise cannot be learnt"
    assert config("T1", "s10", "adpsgd", 1).run.seed != config("T1", "s10", "adpsgd", 0).run.seed
    # The problem is the same but for the algorithm.
    for task in ("T1", "T2", "T3"):
        alone, ddp = (config(task, "s4", name).model_dump() for name in ("alone", "ddp"))
        for settings in (alone, ddp):
            del settings["algorithm"], settings["optimizer"]["fused"]
        assert alone == ddp


def test_shares_compare_with_the_reference_of_the_same_repeat() -> None:
    # The machine is half as fast in the second repeat: the ratio of the medians would be 0.62.
    results = [result("alone", n, rate) for n, rate in enumerate((1000.0, 500.0, 800.0))]
    results += [result("adpsgd", n, rate) for n, rate in enumerate((500.0, 450.0, 800.0))]
    alone, adpsgd = summarize(results)
    assert alone["share_of_alone"] == 1.0 and alone["share_spread"] == 0.0
    assert adpsgd["samples_per_s"] == pytest.approx(500.0)
    assert adpsgd["share_of_alone"] == pytest.approx(0.9)
    assert adpsgd["share_spread"] == pytest.approx(0.5)
    assert adpsgd["cpu_busy"] == pytest.approx(0.5 / cores())
    assert adpsgd["cpu_others"] == pytest.approx(0.25 / cores())


def test_shares_compare_with_the_reference_of_the_same_scenario() -> None:
    quick, slow = Scenario("T1", 2, "none"), Scenario("T1", 4, "none")
    results = [result("alone", 0, 1000.0, scenario=quick), result("ddp", 0, 500.0, scenario=quick)]
    results += [result("alone", 0, 100.0, scenario=slow), result("ddp", 0, 90.0, scenario=slow)]
    # The reference of this repeat failed.
    results += [result("ddp", 1, 90.0, scenario=slow)]
    rows = {(row["ranks"], row["algorithm"]): row for row in summarize(results)}
    assert rows[2, "ddp"]["share_of_alone"] == pytest.approx(0.5)
    assert rows[4, "ddp"]["share_of_alone"] == pytest.approx(0.9)
    assert rows[4, "ddp"]["share_spread"] is None


def test_ranks_that_share_a_gpu_are_marked() -> None:
    two, four = Scenario("T1", 2, "none"), Scenario("T1", 4, "none")
    results = [result("alone", 0, 1.0, scenario=scenario) for scenario in (two, four)]
    rows = summarize(results, gpus=2)
    assert [row["shares_gpu"] for row in rows] == [False, True]
    assert shared_gpus(rows, "NVIDIA H100", 2) == [
        "4 ranks on 2 x NVIDIA H100: functional only: ranks take turns"
    ]
    assert not any(row["shares_gpu"] for row in summarize(results)), "on the CPU"


def test_the_device_reaches_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU they see no GPU; on GPUs they may share one."""
    started: list[dict[str, str]] = []

    def launched(*_: object, env: dict[str, str], **__: object) -> NoReturn:
        started.append(env)
        raise JobFailed("not here")

    monkeypatch.setattr(launch, "run", launched)
    for device in ("cpu", "cuda"):
        (measurement, *_) = Plan(**{**QUICK_PLAN, "device": device}).measurements()
        assert measurement.config(tmp_path).device.share is (device == "cuda")
        with pytest.raises(JobFailed):
            measure(measurement)
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in started] == ["", None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_missing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^bench training: --device cuda: torch sees no GPU here"):
        bench.run("training", ["--quick", "--device", "cuda", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_ddp_on_a_late_stream_has_the_losses_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in ENOUGH_SECONDS:
        losses, times = [], []
        for stream in (None, LateStream(4)):
            monkeypatch.setattr(ddp, "device_stream", lambda device, stream=stream: stream)
            directory = tmp_path / f"{stream} {seconds}"
            directory.mkdir()
            config = Measurement(Scenario("T1", 2, "c2"), "ddp", 0, seconds).config(directory)
            trainer = DdpTrainer(config)  # one rank: there is no launcher
            trainer.run()
            record = read_run_file(rank_path(config.run_directory, 0))
            assert record.tables["train"]["step"].tolist() == list(range(1, trainer.step + 1))
            losses.append(record.tables["train"]["loss"])
            times.append(record.tables["train"]["time_s"])
        compared = min(map(len, losses))
        if compared > 5:
            break
    assert compared > 5
    np.testing.assert_array_equal(losses[0][:compared], losses[1][:compared])
    assert all((np.diff(time) >= 0).all() for time in times)


def test_targets_not_reached_and_bytes_not_counted_are_null() -> None:
    reached = (1.0, np.inf, 3.0)
    results = [result("alone", n, 1.0, seconds_to_worst=s) for n, s in enumerate(reached)]
    results += [result("allreduce", n, 1.0, seconds_to_worst=np.inf) for n in range(3)]
    alone, allreduce = summarize(results)
    assert alone["seconds_to_95_worst"] == 3.0, "the median, with one that never reached the target"
    assert allreduce["seconds_to_95_worst"] is None
    assert allreduce["bytes_per_step"] is None
    json.dumps([alone, allreduce], allow_nan=False)
    assert [len(line) for line in table([alone, allreduce])] == [119] * 3
    assert table([allreduce])[1].split()[-1] == "-"


def test_raw_samples_hold_every_window() -> None:
    samples = columns([result("alone", 0, 1000.0), result("ddp", 0, 500.0)])
    assert {len(values) for values in samples.values()} == {2 * 2 * 20}
    ddp = np.array(samples["algorithm"]) == "ddp"
    assert np.array(samples["samples"])[ddp].sum() == pytest.approx(500.0 * 20)


def test_results_with_different_first_losses_are_not_compared() -> None:
    require_same_start(
        [result("alone", 0, 1.0), result("ddp", 0, 1.0), result("ddp", 1, 1.0, loss=2.4)]
    )
    with pytest.raises(ValueError, match="alone and ddp did not begin alike"):
        require_same_start([result("alone", 0, 1.0), result("ddp", 0, 1.0, loss=2.4)])


def test_windows_cover_the_time_in_which_all_ranks_train() -> None:
    # The last steps end at 5.0 s and 4.2 s.
    fast, slow = 0.002 * np.arange(1, 2501), 0.02 * np.arange(1, 211)
    edges = common_windows([fast, slow], 0.5)
    assert (edges[0], edges[-1]) == (0.5, slow[-1])
    samples = sum(
        counts_per_window(edges, times, 32 * np.arange(1, len(times) + 1)) for times in (fast, slow)
    )
    np.testing.assert_allclose(samples / np.diff(edges), 32 / 0.002 + 32 / 0.02)
    late = 3.0 + slow
    assert common_windows([fast, late], 0.5)[0] == late[0], "not before a rank's first step"
    with pytest.raises(JobFailed, match="--seconds"):
        common_windows([fast, np.array([0.4, 4.9])], 0.5)


def test_tcp_bytes_are_counted() -> None:
    before = tcp_bytes_sent()
    if before is None:
        pytest.skip("this Linux does not count them")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as other,
    ):
        client.sendall(bytes(50_000))
        missing_bytes = 50_000
        while missing_bytes:
            missing_bytes -= len(other.recv(missing_bytes))
        assert tcp_bytes_sent() - before == 50_000  # type: ignore[operator]


@pytest.mark.mpi
@pytest.mark.usefixtures("rank_environment")
def test_real_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speeds are not compared: other programs may run."""
    arguments = "--tasks T1 --ranks 2 --stragglers s10 --algorithms adpsgd,ddp --repeats 1"
    for length in (2, 12):  # seconds; a busy machine may make too few steps in the first ones
        given = [*arguments.split(), "--seconds", str(length), "--json", "--out", str(tmp_path)]
        code = bench.run("training", given)
        out, err = capsys.readouterr()
        if "give more --seconds" not in err:
            break
    assert code == 0, err
    assert "3 measurements, about" in err.splitlines()[0]
    report = json.loads(out)
    rows = {row["algorithm"]: row for row in report["rows"]}
    assert set(rows) == {"alone", "adpsgd", "ddp"}
    for row in rows.values():
        assert (row["task"], row["ranks"], row["straggler"]) == ("T1", 2, "s10")
        assert row["samples_per_s"] > 0
        assert 0.01 < row["share_of_alone"] < 20
        assert row["share_spread"] is None
        assert 0 < row["cpu_busy"] <= 1.05
        assert row["cpu_others"] >= 0
        for model in ("mean", "worst"):
            seconds = row[f"seconds_to_95_{model}"]
            assert seconds is None or 0 < seconds < length + 3
    assert rows["alone"]["bytes_per_step"] == 0
    assert 4 * PARAMETERS < rows["ddp"]["bytes_per_step"] < 1.1 * 4 * PARAMETERS
    assert 0 < rows["adpsgd"]["bytes_per_step"] < 2.2 * 4 * PARAMETERS
    raw, attributes = read_samples(report["samples"])
    assert attributes["bench"] == "training" and len(raw["samples"]) == 3 * 2 * 20
    ddp = raw["algorithm"] == "ddp"
    seconds = raw["end_s"][ddp].max() - raw["begin_s"][ddp].min()
    rate = raw["samples"][ddp].sum() / seconds
    assert rate == pytest.approx(rows["ddp"]["samples_per_s"])


@pytest.mark.mpi
@pytest.mark.usefixtures("rank_environment")
def test_ddp_trains_on_the_same_problem(tmp_path: Path) -> None:
    """Averaging gradients has one outcome: DDP must have the losses of our all-reduce.

    The straggler computes, so that its additional gradients would show if they were applied.
    """
    for seconds in ENOUGH_SECONDS:
        losses = []
        for algorithm in ("allreduce", "ddp"):
            directory = tmp_path / f"{algorithm} {seconds}"
            directory.mkdir()
            config = Measurement(Scenario("T1", 2, "c4"), algorithm, 0, seconds).config(directory)
            file = directory / "config.json"
            file.write_text(config.model_dump_json())
            command = [sys.executable, "-m", "mpi_dasgd.bench.measured_rank", algorithm, str(file)]
            assert launch.run(command, 2, timeout=120, env={"OMP_NUM_THREADS": "1"}).code == 0
            records = [read_run_file(rank_path(config.run_directory, rank)) for rank in range(2)]
            steps = {record.counters["steps"] for record in records}
            assert len(steps) == 1, "ranks in lockstep"
            losses.append([record.tables["train"]["loss"] for record in records])
        compared = min(30, *(len(rank) for ranks in losses for rank in ranks))
        if compared > 5:
            break
    assert compared > 5
    allreduce, ddp = (np.array([rank[:compared] for rank in ranks]) for ranks in losses)
    np.testing.assert_allclose(ddp, allreduce, rtol=1e-3)
