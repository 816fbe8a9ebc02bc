"""Where models are exchanged: by all ranks together, with words on why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import config
from mpi_dasgd.algorithms.build import build_run
from mpi_dasgd.kernels import native
from mpi_dasgd.training import device_choice
from mpi_dasgd.world import World
from tests.support.mpi_ranks import ROOT
from tests.support.rank_pool import run_pooled

COPIED = "models on GPUs are copied to the host and exchanged there: "
REASONS = {
    "algorithm": COPIED + "algorithm 'allreduce' computes on the host in this variant",
    "mode": COPIED + "transport.mode=rma uses Get and Put",
    "gpu of rank 1": COPIED + "rank 1: CuPy is not installed",
    "probe": COPIED + "the probe of CUDA IPC failed: process 1, start: killed by SIGSEGV",
    "probe raises": COPIED + "the probe of CUDA IPC failed: OSError: no processes left",
    "opening on rank 1": COPIED + "rank 1: cuda:1: out of memory",
    "a model on the cpu": COPIED + "the model of rank 1 is on the CPU",
}
DEMANDED = {
    "demanded on the cpu": "the model of rank 0 is on the CPU",
    "demanded, probe": "the probe of CUDA IPC failed: process 1, start: killed by SIGSEGV",
    "demanded, opening": "rank 1: cuda:1: out of memory",
}


@pytest.mark.mpi
def test_all_ranks_choose_the_same_and_one_says_why() -> None:
    found: dict[str, list[dict[str, Any]]] = json.loads(
        run_pooled(2, ROOT / "tests" / "programs" / "device_choice.py").stdout
    )
    nothing = {"memory": "host", "reason": "", "device": "cpu"}
    for told in found.pop("cpu"):
        assert told == {**nothing, "said": [], "probes": [], "reads": []}
    for name in ("ipc", "ipc demanded"):
        first, second = found.pop(name)
        words = "models are exchanged in memory of the GPUs: kernels read at 1000 GB/s"
        assert first["probes"] == [["bus 0", "bus 1"]] and second["probes"] == []
        assert first["said"] == [f"INFO {words}"] and second["said"] == []
        for told in (first, second):
            assert (told["memory"], told["device"], told["reason"]) == ("ipc", "late:0", words)
            assert told["reads"] == [1]
    for told in found.pop("host demanded"):
        assert told["memory"] == "host" and "transport.memory=host" in told["reason"]
        assert told["reads"] == []
    for name, reason in REASONS.items():
        first, second = found.pop(name)
        assert first["said"] == [f"WARNING {reason}"] and second["said"] == []
        for told in (first, second):
            assert (told["memory"], told["device"], told["reason"]) == ("host", "cpu", reason)
    for name, obstacle in DEMANDED.items():
        for told in found.pop(name):
            assert told["on_all_ranks"] and told["said"] == []
            assert f"not possible here: {obstacle}. Change that, or set" in told["error"]
    assert found == {}


TRAIN = """
import sys
from unittest import mock
from mpi_dasgd.cli import main
with mock.patch("torch.cuda.device_count", lambda: 0):
    code = main(["train", *sys.argv[1:]])
sys.exit(code)
"""


@pytest.mark.mpi
def test_a_program_that_demands_what_is_not_possible_ends_with_one_message(tmp_path: Path) -> None:
    job = str(ROOT / "jobs" / "train.toml")
    settings = ["transport.memory=ipc", f"run.directory={tmp_path}"]
    done = run_pooled(2, TRAIN, job, *settings, check=False)
    assert done.codes == [2, 2]
    assert done.stderr.count("mpi-dasgd: error: transport.memory: 'ipc'") == 1
    assert "the model of rank 0 is on the CPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "nodes", "words"),
    [
        (["algorithm.name=allreduce"], 1, "algorithm 'allreduce' computes on the host"),
        (["algorithm.variant=pull"], 1, "algorithm 'adpsgd' computes on the host"),
        (["codec.name=none"], 2, "the ranks are on 2 nodes"),
        ([], 1, ""),
    ],
)
def test_what_keeps_a_run_in_host_memory(settings: list[str], nodes: int, words: str) -> None:
    world = World(None, 0, 2, 0, 2, nodes, "")  # type: ignore[arg-type]
    settings_of_run = config.load(None, settings)
    obstacle = device_choice._obstacle_of_run(world, settings_of_run, build_run(settings_of_run, 2))
    assert obstacle.startswith(words) and bool(obstacle) == bool(words)


def test_models_that_are_no_float32_vectors_and_a_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(None, 0, 2, 0, 2, 1, "")  # type: ignore[arg-type]
    settings = config.load(None, ["codec.name=none"])
    run = build_run(settings, 2, np.dtype(np.float64))
    obstacle = device_choice._obstacle_of_run(world, settings, run)
    assert obstacle == "codec 'none' encodes models of float64 on the host"
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "status", lambda: "no native library")
    run = build_run(settings, 2)
    assert device_choice._obstacle_of_run(world, settings, run) == "rank 0: no native library"
