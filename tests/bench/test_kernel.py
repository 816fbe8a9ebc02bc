"""`bench kernel`: its report follows from its raw samples, and wrong results are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpi_dasgd import bench
from mpi_dasgd.bench import cpu_timer, kernel
from mpi_dasgd.bench.cpu_timer import UNFUSED
from mpi_dasgd.bench.gpu_timer import GpuTimer, cuda_device
from mpi_dasgd.bench.kernel_models import Models
from mpi_dasgd.bench.kernel_report import gpu_lines
from mpi_dasgd.bench.kernel_workload import OPERATIONS, POISON, KernelWorkload
from mpi_dasgd.bench.sample_store import quartiles, read_samples
from mpi_dasgd.errors import MpiDasgdError, UserError
from mpi_dasgd.kernels import cpu, cuda, lattice, native
from mpi_dasgd.kernels.encoded import BITS, FusedStep
from tests.support.cuda_build import shared_library
from tests.support.fake_cupy import DeviceArray, FakeCupy, forget
from tests.support.mpi_ranks import ROOT

NATIVE = native.load() is not None
needs_native = pytest.mark.skipif(not NATIVE, reason=native.status())
needs_no_gpu = pytest.mark.skipif(cuda_device()[0] is not None, reason="there is a CUDA device")
INSTRUCTION_SETS = cpu.instruction_sets() if NATIVE else []

# Bytes per element with 8 bits: float32 read, codes read, float32 written, codes written.
TRAFFIC = {
    "encode": 4 + 0 + 0 + 1,
    "encode_nearest": 4 + 0 + 0 + 1,
    "apply": 4 + 1 + 4 + 0,
    "exchange": 4 + 1 + 4 + 1,
    "merge": 4 + 1 + 4 + 0,
    "merge_subtract": 4 + 1 + 4 + 0,
    "merge_forward": 4 + 1 + 4 + 1,
    "sgd": 12 + 0 + 8 + 0,
    "adamw": 16 + 0 + 12 + 0,
    "fused": 4 + 2 + 4 + 2,
    "sgd_fused": 12 + 2 + 8 + 2,
    "adamw_fused": 16 + 2 + 12 + 2,
    "exchange_unfused": (4 + 1 + 4) + 8 + (8 + 1) + (4 + 1 + 4),
    "merge_forward_unfused": (4 + 1 + 4) + 8 + 12 + (4 + 1),
    "memcpy": 8,
    "triad": 12,
}


def run(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> dict[str, Any]:
    assert bench.run("kernel", ["--json", "--out", str(out), *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@needs_native
@needs_no_gpu
def test_the_report_follows_from_the_raw_samples(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = run(capsys, tmp_path, "--sizes", "5000", "2Ki", "--rounds", "2")
    rows = report["rows"]
    for elements in (5000, 2048):
        sized = [row for row in rows if row["elements"] == elements]
        measured = {(row["op"], row["backend"], row["bits"]) for row in sized}
        codec = {entry for entry in measured if entry[2]}
        expected = set()
        for bits in BITS:
            for op in OPERATIONS if bits == 8 else kernel.MAIN_OPERATIONS:
                expected |= {(op, backend, bits) for backend in (*INSTRUCTION_SETS, "numpy")}
                expected |= {
                    (f"{op}_unfused", backend, bits)
                    for backend in INSTRUCTION_SETS
                    if op in UNFUSED
                }
        assert codec == expected
        assert {op for op, _, bits in measured if not bits} == {"memcpy", "triad"}
        assert len(measured) == len(sized)
    columns, attributes = read_samples(report["samples"])
    assert attributes["bench"] == "kernel" and attributes["threads"] == 1
    assert {"load_before", "clock", "cpu_model", "numpy"} < set(attributes)
    for row in rows:
        selected = columns["warm_up"] == 0
        for name in ("op", "backend", "bits", "elements"):
            selected &= columns[name] == row[name]
        seconds = columns["seconds"][selected]
        baseline = [columns[f"yardstick_{when}_seconds"][selected] for when in ("before", "after")]
        assert seconds.size == row["samples"] == 2
        assert row["median_ms"] == pytest.approx(np.median(seconds) * 1e3)
        assert row["min_ms"] == pytest.approx(seconds.min() * 1e3)
        nbytes = row["elements"] * row["bytes_per_element"]
        assert row["gb_per_s"] == pytest.approx(nbytes / np.median(seconds) / 1e9)
        if not row["bits"]:
            assert row["ratio_to_trivial"] is row["ratio_to_fused"] is None
            continue
        unfused = row["op"].endswith("_unfused")
        ratios = quartiles(seconds / np.mean(baseline, axis=0))
        assert row["ratio_to_fused" if unfused else "ratio_to_trivial"] == pytest.approx(
            ratios.median
        )
        assert row["ratio_to_trivial" if unfused else "ratio_to_fused"] is None
        assert (row["ratio_q1"], row["ratio_q3"]) == pytest.approx((ratios.q1, ratios.q3))
        assert row["ratio_of_min"] == pytest.approx(seconds.min() / np.min(baseline))
        if row["bits"] == 8:
            assert row["bytes_per_element"] == TRAFFIC[row["op"]], row["op"]


@pytest.mark.slow
@needs_native
def test_the_options_choose_operations_backends_and_bits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = "--sizes 1Mi --bits 4 16 --backends numpy SSE2 --ops apply exchange --threads 2"
    if "SSE2" not in INSTRUCTION_SETS:
        arguments = arguments.replace("SSE2", INSTRUCTION_SETS[-1])
    rows = run(capsys, tmp_path, *arguments.split(), "--rounds", "1")["rows"]
    measured = [(r["op"], r["backend"], r["bits"]) for r in rows if r["bits"]]
    expected = {
        (op, backend, bits)
        for op in ("apply", "exchange")
        for backend in ("numpy", INSTRUCTION_SETS[-1])
        for bits in (4, 16)
    }
    expected |= {("exchange_unfused", INSTRUCTION_SETS[-1], bits) for bits in (4, 16)}
    assert set(measured) == expected and len(measured) == len(expected)
    assert {r["threads"] for r in rows} == {2}
    assert {r["bytes_per_element"] for r in rows if r["op"] == "exchange"} == {9, 12}
    # The best instruction set is in use again.
    assert cpu.instruction_sets()[0] in native.load().mpd_instruction_set().decode()


@needs_native
def test_exchange_is_not_far_from_memory_bandwidth(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "--sizes",
        "2M",
        "--bits",
        "8",
        "--backends",
        INSTRUCTION_SETS[0],
        "--ops",
        "exchange",
    ]
    rows = run(capsys, tmp_path, *arguments, "--rounds", "9")["rows"]
    (fused,) = [row for row in rows if row["op"] == "exchange"]
    if INSTRUCTION_SETS[0].startswith("AVX"):
        assert fused["ratio_to_trivial"] < 8, fused


@needs_native
def test_the_table_ends_with_the_path_of_the_samples(tmp_path: Path) -> None:
    command = "-m mpi_dasgd bench kernel --sizes 1000 --rounds 1 --ops encode exchange --bits 8"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("native kernels (") and "load: " in lines[0]
    assert lines[1].split()[:3] == ["op", "backend", "bits"]
    (samples,) = (tmp_path / "bench-results").iterdir()
    assert lines[-1] == f"raw samples: bench-results/{samples.name}"


# --- results and their check ---


@needs_native
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["trivial", "streamed"])
def test_roofline_loops_write_all_outputs_and_no_model(bits: int, name: str) -> None:
    workload = KernelWorkload.make(Models.make(5 * 1024), bits)
    models = workload.models
    for isa in INSTRUCTION_SETS:
        cpu.use_instruction_set(isa)
        for op, operation in OPERATIONS.items():
            workload.restore()
            before = {part: array.tobytes() for part, array, _ in workload.results()}
            step = operation.step(workload)
            cpu.roofline(step, name, np.zeros_like(models.x))()
            written = {
                part for part, array, _ in workload.results() if array.tobytes() != before[part]
            }
            outputs = {"reply_delta": step.reply_delta, "publication": step.publication}
            expected = {f"{part}.codes" for part, out in outputs.items() if out is not None}
            assert written == expected, (op, isa)
            for part in expected:
                codes = getattr(workload, part.split(".")[0]).codes
                # Some codes are this value by chance.
                assert (codes != POISON).mean() > 0.9, (op, isa)
    cpu.use_instruction_set(INSTRUCTION_SETS[0])


@needs_native
def test_a_wrong_result_of_a_kernel_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prepared = cpu.prepared

    def wrong(step: FusedStep) -> Any:
        correct = prepared(step)

        def call() -> None:
            correct()
            step.x[-1] += 1

        return call

    monkeypatch.setattr(cpu, "prepared", wrong)
    with pytest.raises(MpiDasgdError, match=r"merge with . bits and 5000 elements on .*x is wrong"):
        bench.run(
            "kernel", ["--sizes", "5000", "--rounds", "1", "--ops", "merge", "--out", str(tmp_path)]
        )
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_a_wrong_result_of_separate_passes_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(cpu_timer.UNFUSED, "exchange", ("decode", "statistics", "move"))
    with pytest.raises(MpiDasgdError, match=r"exchange_unfused with .* is wrong"):
        bench.run("kernel", ["--sizes", "5000", "--rounds", "1", "--out", str(tmp_path)])


@needs_native
def test_a_large_model_is_compared_in_blocks() -> None:
    workload = KernelWorkload.make(Models.make(40 * 64 * 1024 + 17), 8)
    firsts = workload._checked_blocks()
    assert len(firsts) == 16 and {0, 40 * 64} < set(firsts)
    operation = OPERATIONS["fused"]
    workload.restore()
    cpu.run(operation.step(workload))
    workload.check(operation)
    workload.models.x[-1] += 1
    with pytest.raises(MpiDasgdError, match="x is wrong from bucket 2560 on"):
        workload.check(operation)


class Pointer:
    """Device memory, in NumPy."""

    def __init__(self, nbytes: int) -> None:
        self.memory = np.zeros(nbytes, np.uint8)

    def __add__(self, offset: int) -> Pointer:
        moved = Pointer(0)
        moved.memory = self.memory[offset:]
        return moved

    def copy_from_device_async(self, source: Pointer, nbytes: int) -> None:
        assert nbytes <= source.memory.size
        self.memory[:nbytes] = source.memory[:nbytes]


class Event:
    """CUDA event that has occurred when it is first queried, and has not at later queries."""

    queries = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    @property
    def done(self) -> bool:
        Event.queries += 1
        return Event.queries == 1


@needs_native
def test_gpu_operations_on_a_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(attributes={"L2CacheSize": 100_000}),
        Event=Event,
        alloc=Pointer,
        get_elapsed_time=lambda begin, end: 4.0,
    )
    fake = SimpleNamespace(cuda=cuda, asarray=np.array, empty=np.empty, zeros=np.zeros)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(GpuTimer, "_BUSY_BYTES", 1000)
    workload = KernelWorkload.make(Models.make(3000), 8)
    timer = GpuTimer(workload.models)
    operations = [
        *timer.memory_operations(),
        *timer.codec_operations(workload, list(OPERATIONS)),
    ]
    assert len(operations) == 1 + len(OPERATIONS)
    # The operation with the least traffic, encode, needs the most sets of arrays.
    assert len(timer.model_sets) == 1 + int(2 * 100_000 / (5 * 3000))
    for operation in operations:
        operation.prepare()
        launches = max(timer._set_count(operation.traffic * 3000), 8)
        assert operation.run() == pytest.approx(4e-3 / launches)
        operation.run_baseline()
        operation.check()
    assert timer.busy_copies == 8, "doubled after the one time that the device was idle"
    timer.model_sets[0].x.fill(np.nan)
    operation.run()
    with pytest.raises(MpiDasgdError, match="buckets were rejected while time was taken"):
        operation.check()


class ShimCupy(FakeCupy):
    """What the benchmark uses of CuPy, over memory of the host; its kernels run in the shim."""

    def __init__(self) -> None:
        super().__init__(shared_library())
        attributes = {"L2CacheSize": 10_000}
        vars(self.cuda).update(
            Device=lambda: SimpleNamespace(attributes=attributes, id=0),
            Event=Event,
            alloc=Pointer,
            get_elapsed_time=lambda begin, end: 4.0,
        )
        self.properties["name"] = b"the shim"

    def empty(self, size: int, dtype: Any) -> DeviceArray:
        return np.empty(size, dtype).view(DeviceArray)


@pytest.mark.slow
@needs_native
def test_all_of_it_on_kernels_in_the_shim(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, whose kernels must have the reference's bits."""
    cupy = ShimCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(GpuTimer, "_BUSY_BYTES", 1000)
    choice = {True: cuda, False: cpu}
    monkeypatch.setattr(lattice, "backend_of", lambda array: choice[isinstance(array, DeviceArray)])
    forget()
    command = ["--backend", "cuda", "--sizes", "3000", "5000", "--bits", "8", "--rounds", "1"]
    assert bench.run("kernel", [*command, "--out", str(tmp_path)]) == 0
    forget()
    assert {name.removesuffix("_8") for name in cupy.launched} >= {"mpd_encode", "mpd_fused"}
    first, second, path = capsys.readouterr().out.splitlines()[-3:]
    assert first.startswith("KERNEL 3000 elements, 8 bits on the shim, of a copy: encode ")
    assert second.startswith("KERNEL 5000 elements") and path.startswith("raw samples: ")


def test_the_line_of_a_gpu_has_the_shares_of_each_size() -> None:
    rows = [
        {"op": op, "elements": elements, "bits": 8, "percent_of_copy": share}
        for elements, share in ((25_000_000, 87.5), (100_000_000, 90.0))
        for op in ("encode", "merge", "fused")
    ]
    assert gpu_lines([{"op": "triad", "elements": 1, "bits": 0}, *rows], "NVIDIA H100") == [
        f"KERNEL {elements} elements, 8 bits on NVIDIA H100, of a copy: "
        f"encode {share}, fused {share}, merge {share}"
        for elements, share in ((25_000_000, "0.88"), (100_000_000, "0.90"))
    ]


# --- arguments ---


@needs_native
@needs_no_gpu
@pytest.mark.parametrize("option", ["--backend", "--backends"])
def test_cuda_without_a_device_is_refused(option: str) -> None:
    with pytest.raises(UserError, match="there is no CUDA device here"):
        bench.run("kernel", [option, "cuda"])


def test_missing_native_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(UserError, match="roofline loops are part of what is missing"):
        bench.run("kernel", [])
