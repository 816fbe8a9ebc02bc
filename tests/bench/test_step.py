"""`bench step`: its jobs, groups of arms, paired ratios, and real ranks."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import bench
from mpi_dasgd.bench import machine, step_plan
from mpi_dasgd.bench.meeting_point import MeetingPoint
from mpi_dasgd.bench.sample_store import columns_of, read_samples, write_samples
from mpi_dasgd.bench.step_job import ARMS, LOCKSTEP, StepJob
from mpi_dasgd.bench.step_picture import draw
from mpi_dasgd.bench.step_plan import FULL_PLAN, QUICK_PLAN, StepPlan, group_arms
from mpi_dasgd.bench.step_rank import StepRank, _require_same_start
from mpi_dasgd.bench.step_report import markdown, summarize, table
from mpi_dasgd.errors import UserError

NUMBERS = {"rounds": 4, "ranks": 2, "straggler": "none", "optimizer": "SGD", "codec": "auto"}


def job(**change: Any) -> StepJob:
    return StepJob(**{"task": "T1", "groups": [list(ARMS)], **NUMBERS, **change})


def row(arm: str, number: int, seconds: float, rank: int = 0, **change: Any) -> dict[str, Any]:
    """Return the raw samples of a slice of 10 steps, half of whose time is behind the gradient."""
    values = {"straggler": "none", "slow": False, "steps": 10, "messages": 9, **change}
    times = {"seconds": seconds, "update_seconds": seconds / 2, "cpu_seconds": seconds / 4}
    fixed = {"task": "T1", "ranks": 2, "optimizer": "SGD", "codec": "auto", "cores": 2}
    return {**fixed, "round": number, "arm": arm, "rank": rank, **times, **values}


def summary(*rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    columns = {name: np.array(values) for name, values in columns_of(rows).items()}
    return {found["arm"]: found for found in summarize(columns)}


def test_every_combination_is_a_job_with_all_arms_in_the_same_processes() -> None:
    plan = StepPlan(**{**FULL_PLAN, "tasks": ("T1", "T2", "T1")})
    jobs = list(plan.jobs(None))
    assert len(jobs) == len({str(job) for job in jobs}) == 2 * 2 * 2 * 2
    assert all(job.groups == [list(ARMS)] and job.expected_seconds > 0 for job in jobs)
    (quick,) = StepPlan(**QUICK_PLAN).jobs(None)
    assert str(quick) == "T1 n=2 none SGD"
    (two,) = StepPlan(**{**QUICK_PLAN, "arms": ("ddp", "swarm")}).jobs(None)
    assert two.groups == [["alone", "swarm", "ddp"]], "the reference always"
    assert two.expected_seconds < quick.expected_seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["T4"]}, "--tasks: 'T4' is not known"),
        ({"arms": ["adpsgd-fused"]}, "--arms: 'adpsgd-fused' is not known"),
        ({"optimizers": ["Adamw"]}, "--optimizers: 'Adamw' is not known; did you mean"),
        ({"stragglers": ["c10"]}, "--stragglers: 'c10'"),
        ({"stragglers": ["s1"]}, "--stragglers: 's1'"),
        ({"codec": "lattice5"}, "--codec: 'lattice5'"),
        ({"ranks": [2, 1]}, "--ranks: needs 2 or more, got 1"),
        ({"rounds": 0}, "--rounds must be 1 or more"),
    ],
)
def test_wrong_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^bench step: {message}"):
        StepPlan(**{**QUICK_PLAN, **change})


def test_arms_share_memory_in_turn_beside_their_references() -> None:
    sizes = {"alone": 3.0, "alone-fused": 3.0, "adpsgd": 5.0, "swarm": 7.0, "ddp": 4.0}
    assert group_arms(sizes, None) == [list(sizes)]
    assert group_arms(sizes, 22.0) == [list(sizes)]
    references = ["alone", "alone-fused"]
    assert group_arms(sizes, 18.0) == [[*references, "adpsgd", "swarm"], [*references, "ddp"]]
    assert group_arms(sizes, 13.0) == [[*references, arm] for arm in ("adpsgd", "swarm", "ddp")]
    with pytest.raises(MemoryError):
        group_arms(sizes, 12.9)


def test_a_large_model_on_four_ranks_fits_into_12_gigabytes() -> None:
    large = {**FULL_PLAN, "tasks": ("T2",), "ranks": (4,), "optimizers": ("AdamW",)}
    plan = StepPlan(**large)
    (job, _) = plan.jobs(12e9)
    assert len(job.groups) > 1 and all({"alone", "alone-fused"} < {*g} for g in job.groups)
    assert {"adpsgd", "adpsgd-unfused"} < {*job.groups[0]}, "also compared with each other"
    assert sorted(arm for group in job.groups for arm in group[2:]) == sorted([*ARMS][2:])
    (whole, _) = plan.jobs(None)
    assert job.expected_seconds > whole.expected_seconds, "the references are measured in each"
    with pytest.raises(UserError, match=r"^bench step: T2 with 4 ranks: .* GB are not free"):
        list(plan.jobs(6e9))


def test_arms_differ_in_their_step_alone() -> None:
    slowed = job(straggler="s10", optimizer="AdamW")
    configs = {arm: slowed.config(arm) for arm in ARMS}
    for config in configs.values():
        assert config.straggler.factor == 10 and config.straggler.mode == "sleep"
        assert (config.task, config.run) == (configs["alone"].task, configs["alone"].run)
        assert config.optimizer.name == "AdamW" and config.optimizer.lr == 1e-4
    assert {arm for arm in ARMS if configs[arm].optimizer.options} == {"alone-fused"}
    assert {arm for arm in ARMS if configs[arm].optimizer.fused == "off"} == {"adpsgd-unfused"}
    assert {configs[arm].algorithm.name for arm in ("alone", "alone-fused", "ddp")} == {"alone"}
    assert configs["adpsgd"].algorithm.local_steps == 1
    assert configs["swarm"].algorithm.local_steps == 4
    assert job().config("adpsgd").straggler.distribution == "none"
    # A straggler would make slices of arms in lockstep ten times longer.
    assert slowed.slice_steps("adpsgd") == job().slice_steps("ddp") == (8, 48)
    assert slowed.slice_steps("ddp") == slowed.slice_steps("allreduce") == (1, 4)


def test_ranks_meet_and_know_when_the_others_are_done(tmp_path: Path) -> None:
    path = tmp_path / "words"
    MeetingPoint.create(path, 3)
    points = [MeetingPoint(path, rank) for rank in range(3)]
    came: list[int] = []

    def come(rank: int) -> None:
        points[rank].meet()
        came.append(rank)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    assert not came, "one is missing"
    points[2].meet()
    for thread in threads:
        thread.join(10)
    assert sorted(came) == [0, 1]
    points[0].report_done()
    assert points[1].have_done(1) and not points[1].have_done(2)
    points[1].report_done()
    assert points[0].have_done(2) and not points[0].have_done(3)


def test_a_straggler_sleeps_on_in_the_next_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices shorter than its step would otherwise never see one."""
    now = [0.0]
    monkeypatch.setattr(
        "mpi_dasgd.bench.step_rank.time",
        SimpleNamespace(
            perf_counter=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
        ),
    )
    rank = StepRank.__new__(StepRank)
    rank._sleep_left, rank._gradient_seconds = {}, [0.1, 0.3, 0.2]  # type: ignore[assignment]
    straggler = SimpleNamespace(extra_seconds=lambda step, seconds: 9 * seconds)
    arm: Any = SimpleNamespace(
        name="adpsgd", steps=3, workload=SimpleNamespace(straggler=straggler)
    )
    ends = iter([0.8, 1.6, 2.4])  # of slices; the sleep is one of 1.8 s
    made = []
    for end in ends:
        made.append(rank._sleep(arm, lambda end=end: now[0] >= end))  # type: ignore[misc]
        now[0] = max(now[0], end)
    assert made == [False, False, True]
    assert rank._sleep_left == {}


def test_arms_that_did_not_begin_alike_are_refused() -> None:
    arms: list[Any] = [
        SimpleNamespace(name=name, steps=steps, first_loss=loss)
        for name, steps, loss in [("alone", 6, 2.3), ("adpsgd", 5, 2.3), ("swarm", 0, np.nan)]
    ]
    _require_same_start(arms)  # the straggler slept all the time in one of them
    arms[1].first_loss = 2.4
    with pytest.raises(ValueError, match="did not begin alike: .*'adpsgd': 2.4"):
        _require_same_start(arms)


def test_ratios_pair_the_slices_of_a_round() -> None:
    # The machine is half as fast in the second round, and the arm is missing from the last.
    pace = (1.0, 2.0, 1.0, 1.0, 1.0)
    rows = [row("alone", number, seconds) for number, seconds in enumerate(pace)]
    rows += [row("alone-fused", number, 0.8 * seconds) for number, seconds in enumerate(pace)]
    slower = (1.1, 1.25, 1.25, 1.4)
    rows += [row("adpsgd", n, pace[n] * factor) for n, factor in enumerate(slower)]
    found = summary(*rows)
    assert found["adpsgd"]["rounds"] == 4 and found["alone"]["rounds"] == 5
    assert found["adpsgd"]["share_of_alone"] == pytest.approx(0.8)
    assert found["adpsgd"]["share_of_alone_fused"] == pytest.approx(0.64)
    ratios = np.percentile([1 / factor for factor in slower], (25, 75))
    quarters = [found["adpsgd"][f"share_of_alone_q{number}"] for number in (1, 3)]
    np.testing.assert_allclose(quarters, ratios)
    assert found["alone"]["share_of_alone_q1"] == found["alone"]["share_of_alone_q3"] == 1.0
    assert found["adpsgd"]["cpu_share_of_alone_fused"] == pytest.approx(0.64), "a fourth of all"
    assert found["alone"]["step_ms"] == pytest.approx(100.0)
    assert found["alone"]["update_ms"] == pytest.approx(50.0)
    assert found["alone"]["cpu_ms"] == pytest.approx(25.0)


def test_the_slowed_rank_is_not_compared_but_counts_as_load() -> None:
    slow = {"slow": True, "straggler": "s10", "rank": 1, "steps": 1, "messages": 0}
    rows = [row("alone", 0, 1.0, straggler="s10"), row("alone", 0, 1.2, **slow)]
    rows += [row("adpsgd", 0, 1.0, straggler="s10"), row("adpsgd", 0, 9.0, **slow)]
    rows += [row("idle", 0, 1.0, steps=0, messages=0, straggler="s10", cpu_seconds=0.02)]
    rows += [row("idle", 0, 1.0, **{**slow, "steps": 0}, cpu_seconds=0.0)]
    found = summary(*rows)
    assert found["adpsgd"]["share_of_alone"] == pytest.approx(1.0)
    assert found["adpsgd"]["step_ms"] == pytest.approx(100.0)
    assert found["adpsgd"]["cpu_busy"] == pytest.approx(0.25)
    assert found["adpsgd"]["slow_busy"] == pytest.approx(0.25)
    assert found["adpsgd"]["messages_per_step"] == pytest.approx(9 / 11)
    assert found["idle"]["cpu_busy"] == pytest.approx(0.01)
    json.dumps(list(found.values()), allow_nan=False)


def test_arms_without_a_reference_in_the_same_rounds_have_no_ratio() -> None:
    found = summary(row("alone", 0, 1.0), row("adpsgd", 1, 1.0), row("idle", 0, 1.0, steps=0))
    assert found["adpsgd"]["share_of_alone"] is None
    assert found["alone"]["share_of_alone_fused"] is None
    assert "-" in table(list(found.values()))[-2].split()


def _two_jobs() -> list[dict[str, Any]]:
    rows = []
    for straggler in ("none", "s10"):
        for number in range(3):
            rows += [row(arm, number, 1.0, straggler=straggler) for arm in ("alone", "adpsgd")]
            rows += [row("idle", number, 1.0, straggler=straggler, steps=0)]
    return rows


def test_tables_name_each_job_once() -> None:
    columns = {name: np.array(values) for name, values in columns_of(_two_jobs()).items()}
    rows = summarize(columns)
    lines = table(rows)
    assert [line.strip() for line in lines if "ranks" in line] == [
        "T1 SGD, 2 ranks (3 rounds)",
        "T1 SGD, 2 ranks, one 10x slower (3 rounds)",
    ]
    assert len({len(line) for line in lines if line.startswith("  ")}) == 1
    assert markdown(rows)[2:] == [
        "| T1 SGD, 2 ranks | 100 ms | **1.00** (1.00 .. 1.00) |",
        "| T1 SGD, 2 ranks, one 10x slower | 100 ms | **1.00** (1.00 .. 1.00) |",
    ]


def test_stored_samples_are_reported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = write_samples(tmp_path / "old.h5", "step", columns_of(_two_jobs()))
    assert bench.run("step", ["--samples", str(path), "--markdown"]) == 0
    assert "one 10x slower" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    other = write_samples(tmp_path / "other.h5", "training", columns_of(_two_jobs()))
    with pytest.raises(UserError, match="samples of `bench training`"):
        bench.run("step", ["--samples", str(other)])
    with pytest.raises(UserError, match="cannot be read"):
        bench.run("step", ["--samples", str(tmp_path / "none.h5")])


def test_a_picture_has_a_panel_for_each_task_and_optimizer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    rows = list(summary(*_two_jobs()).values())
    one = image.imread(draw(rows, tmp_path / "one.png"))
    other: list[Mapping[str, Any]] = [{**found, "optimizer": "AdamW"} for found in rows]
    two = image.imread(draw([*rows, *other], tmp_path / "two.png"))
    assert two.shape[1] > 1.5 * one.shape[1]


@pytest.mark.mpi
@pytest.mark.usefixtures("rank_environment")
def test_real_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of arms in one job, with a straggler. Speeds are not compared."""
    monkeypatch.setattr(step_plan, "group_arms", lambda sizes, memory: group_arms(sizes, 1.35e6))
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    arguments = "--quick --stragglers s10 --rounds 1 --json --out"
    assert bench.run("step", [*arguments.split(), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "1 measurements, about" in err.splitlines()[0]
    report = json.loads(out)
    rows = {found["arm"]: found for found in report["rows"]}
    assert set(rows) == {*ARMS, "idle"}
    raw, attributes = read_samples(report["samples"])
    assert attributes["bench"] == "step"
    groups = len(set(raw["round"].tolist()))
    assert groups > 1 and len(raw["arm"]) == 2 * (len(ARMS) + 2 * (groups - 1) + groups)
    slow = raw["slow"].astype(bool)
    assert set(raw["rank"][slow]) == {1}
    for arm in ARMS:
        found, chosen = rows[arm], raw["arm"] == arm
        assert 0 < found["update_ms"] < found["step_ms"]
        assert 0.001 < found["share_of_alone"] < 100
        steps, slow_steps = (int(raw["steps"][chosen & who].sum()) for who in (~slow, slow))
        if arm in LOCKSTEP:
            assert steps == slow_steps == 4 * len(set(raw["round"][chosen]))
        else:
            assert 0 < slow_steps < steps / 2 and steps >= 48
    assert rows["adpsgd"]["messages_per_step"] > 0
    assert rows["alone"]["messages_per_step"] == 0
    assert rows["idle"]["cpu_busy"] < 0.5
