"""`bench gpu order`: words that move too early are found, and those of a release are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpi_dasgd import bench
from mpi_dasgd.bench import gpu_order
from mpi_dasgd.bench.gpu_order import Round, measure, summarize
from mpi_dasgd.bench.sample_store import read_samples
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native
from mpi_dasgd.transport.release import Immediate
from tests.support.fake_cuda import FakeCuda, build_libcuda
from tests.support.late_device import LateDevice

NATIVE = native.load()
needs_native = pytest.mark.skipif(NATIVE is None, reason=native.status())
LATE = 20e-3  # seconds: longer than a core is taken from the host in between
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def late() -> Iterator[tuple[LateDevice, gpu_order.Work, np.ndarray]]:
    """A device that does its work later, in another thread."""
    device = LateDevice((LATE, 1.5 * LATE))
    written = np.zeros(1, np.int64)

    def work(number: int, slow: bool) -> None:
        device.submit(lambda: written.__setitem__(0, number))

    yield device, work, written
    device.close()


@needs_native
def test_words_move_behind_the_work_and_the_control_before(
    late: tuple[LateDevice, gpu_order.Work, np.ndarray],
) -> None:
    assert NATIVE is not None
    rounds = measure(*late, NATIVE, 5)
    summary = summarize(rounds)
    assert [r.release for r in rounds] == ["launched"] * 5 + ["idle"] * 5 + ["immediate"] * 5
    assert (summary["early"], summary["control_early"], summary["in_order"]) == (0, 5, True)
    assert all(0 <= r.latency_s < r.total_s and r.flush_s < r.total_s for r in rounds[:10])
    assert all(r.total_s > LATE for r in rounds[:10])
    assert min(r.total_s for r in rounds[10:]) < LATE


@needs_native
def test_a_release_that_is_too_early_is_found(
    late: tuple[LateDevice, gpu_order.Work, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_order, "Launched", lambda words, *_: Immediate(words))
    monkeypatch.setattr(gpu_order, "require_gpu", lambda _: "a late device")
    monkeypatch.setattr(gpu_order, "_cuda", lambda: late)
    assert bench.run("gpu", ["order", "--rounds", "3", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    line = "ORDER WRONG on a late device: 6 of 6 words moved before their mark, 3 of 3 of the"
    assert line in out.splitlines()[-1]
    (path,) = tmp_path.iterdir()
    columns, attributes = read_samples(path)
    assert attributes["device"] == "a late device" and columns["early"].all()


@needs_native
def test_every_line_for_a_gpu_runs_on_a_cuda_of_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work is done there when it is asked for, and host functions are late: no word is early."""
    busy: list[float] = []
    stream = SimpleNamespace(keep_busy=busy.append)
    monkeypatch.setattr(gpu_order, "CudaStream", lambda device: stream)
    monkeypatch.setattr(gpu_order, "require_gpu", lambda _: "a CUDA of host memory")
    with FakeCuda(build_libcuda(tmp_path)).installed() as fake:
        fake.runtime.libcuda.fake_cuda_delay(1000)
        code = bench.run("gpu", ["order", "--rounds", "4", "--json", "--out", str(tmp_path)])
        fake.runtime.libcuda.fake_cuda_drain()
    report = json.loads(capsys.readouterr().out)
    assert (report["rounds"], report["early"], report["control_early"]) == (4, 0, 0)
    assert code == 1, "the control proves nothing on such a device"
    assert report["idle_median_us"] > 900 and len(busy) == 1 + 2 * 4


def test_a_control_that_is_not_early_proves_nothing() -> None:
    rounds = [Round(name, False, 1e-5, 1e-6, 2e-5) for name in ("launched", "idle", "immediate")]
    assert summarize(rounds)["in_order"] is False


@pytest.mark.parametrize(("late", "in_order"), [(1, True), (2, False)])
def test_the_control_may_be_interrupted_once_in_twenty_words(late: int, in_order: bool) -> None:
    rounds = [
        Round(name, name == "immediate" and number >= late, 1e-5, 1e-6, 2e-5)
        for name in ("launched", "idle", "immediate")
        for number in range(20)
    ]
    assert summarize(rounds)["in_order"] is in_order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench gpu: expected what to measure"),
        (["ordr"], "'ordr' is not known; did you mean 'order'"),
        (["order", "--rounds", "0"], "--rounds must be at least 1"),
        pytest.param(["order"], "bench gpu order: torch sees no GPU here", marks=needs_no_gpu),
        pytest.param(["overhead"], "bench gpu overhead: torch sees no GPU", marks=needs_no_gpu),
        (["overhead", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.run("gpu", arguments)
