"""Real ranks train through the whole path of a GPU, on none: words, memory, kernels and order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cuda_build import shared_library
from tests.support.fake_cuda import build_libcuda
from tests.support.mpi_ranks import ROOT, run_ranks

PROGRAM = ROOT / "tests" / "programs" / "fake_gpu.py"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A libcuda and the kernels, on the CPU."""
    return str(build_libcuda(tmp_path_factory.mktemp("libcuda"))), str(shared_library())


@pytest.mark.concurrent
def test_ranks_train_as_on_the_host(libraries: tuple[str, str], tmp_path: Path) -> None:
    done = run_ranks(2, PROGRAM, *libraries, str(tmp_path / "runs"), timeout=200)
    reports = json.loads(done.stdout.splitlines()[-1])
    for report in reports:
        exchanges = report["sum"]
        assert exchanges["kinds"] == ["CudaDevice", "Launched", "in place (CUDA IPC)"]
        assert exchanges["records"] > 200
        assert exchanges["steps_of_optimizer"] == exchanges["steps"]  # none by torch
        assert exchanges["of_sum"] < 2e-6
        assert exchanges["apart"][1] < 1e-3 * exchanges["apart"][0]
        assert exchanges["corrupt"] == exchanges["waits_in_steps"] == exchanges["in_use"] == 0
        assert exchanges["events_created_in_steps"] <= 4  # more are on their way if it is busy
        calls = exchanges["calls"]
        assert calls["streamWaitEvent"] > 100  # words are given away
        for name in ("malloc", "free", "ipcGetMemHandle", "ipcOpenMemHandle", "ipcCloseMemHandle"):
            assert calls[name] == 1, name
        host, device = report["host"], report["device"]
        assert device["transport"] == "in place (CUDA IPC)" != host["transport"]
        assert min(device["messages"]) > 20
        assert sum(device["messages"]) == sum(device["absorbed"])
        assert sum(device["buckets_corrupt"]) == 0
        assert sum(device["buckets_rejected"]) < 0.1 * sum(device["buckets_decoded"])
        assert min(device["accuracy"]) > min(host["accuracy"]) - 0.04 > 0.9


@pytest.mark.concurrent
def test_a_device_that_fails_ends_the_job_with_its_error(libraries: tuple[str, str]) -> None:
    done = run_ranks(2, PROGRAM, *libraries, "fail", check=False, timeout=120)
    assert done.code == 1
    assert done.seconds < 60
    assert done.stderr.count("mpi-dasgd: rank 1: error: cuda:0: ") == 1
    assert "failed: cudaErrorLaunchFailure: unspecified launch failure" in done.stderr
    assert "Traceback" not in done.stderr
