"""The CUDA kernels compile, for three generations of GPUs, to the intended machine code.

NVRTC and the disassembler come from PyPI (extra ``dev``); neither a GPU nor its driver is needed.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from mpi_dasgd.kernels import cuda
from mpi_dasgd.kernels.cuda.optimizer import KINDS, OPTIMIZER
from mpi_dasgd.kernels.cuda.pair_average import AVERAGE
from mpi_dasgd.kernels.cuda.program import OPTIONS, Program
from mpi_dasgd.kernels.cuda.scale import SCALE
from mpi_dasgd.kernels.cuda.table import TABLE
from mpi_dasgd.kernels.encoded import BITS
from tests.support.fake_cupy import PROGRAMS
from tests.support.mpi_ranks import missing

pytestmark = pytest.mark.slow

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
CUPY_OPTIONS = (*OPTIONS, "-ftz=true", "--device-as-default-execution-space")
"""Our options, and those that CuPy 14 adds after them."""
STAGES = {kind: f"-DMPD_OPTIMIZER={kind}" for kind in (0, *KINDS)}
SOURCES: tuple[tuple[Program, tuple[str, ...]], ...] = (
    *((cuda.LATTICE, (f"-DMPD_BITS={bits}", s)) for bits in BITS for s in STAGES.values()),
    *((AVERAGE, (s,)) for s in STAGES.values()),
    *((OPTIMIZER, (STAGES[kind],)) for kind in KINDS),
    (SCALE, ()), (TABLE, ()),
)  # fmt: skip
ALL = 90
ONLY_ONCE = [
    (program, defines)
    for program, defines in SOURCES
    if program in (cuda.LATTICE, AVERAGE) and STAGES[0] not in defines
    and "-DMPD_BITS=8" not in defines
]  # fmt: skip
"""Sources that are compiled for `ALL` alone, to save time."""

ACCESSES = {  # loads and stores of 16 bytes
    "encode": (8, 0),
    "apply": (8, 8),
    "exchange": (8, 8),
    "merge": (8, 8),
    "merge_forward": (8, 8),
    "fused": (8, 8),
    "fused_sgd": (24, 16),
    "fused_adam": (40, 32),
}
LATTICE_ACCESSES = {f"mpd_{name}_{bits}": n for name, n in ACCESSES.items() for bits in BITS}
OTHER_ACCESSES: dict[str, tuple[int, ...]] = {  # loads and stores of 16 bytes, and of 8
    "mpd_measure": (8, 0, 0, 0),
    "mpd_average_none": (12, 12, 0, 1),  # the last is the sum of a warp
    "mpd_average_bf16": (4, 4, 8, 9),
    "mpd_average_fp16": (4, 4, 8, 9),
    "mpd_average_none_sgd": (20, 16),  # besides those of segments
    "mpd_average_bf16_sgd": (12, 8),
    "mpd_average_fp16_sgd": (12, 8),
    "mpd_average_none_adam": (28, 24),
    "mpd_average_bf16_adam": (20, 16),
    "mpd_average_fp16_adam": (20, 16),
    "mpd_sgd": (12, 8),
    "mpd_adam": (20, 16),
}
WRITTEN = {"sgd": 5, "adam": 4}
"""Fused multiply-adds of an element that are written, by kind of the optimizer."""


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: the assembler's report, and the number of each of its instructions."""

    name: str
    registers: int
    report: str
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """Return the number of instructions whose name begins with a match of `pattern`."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


class Compiled(dict[int, list[Kernel]]):
    """All kernels of each architecture, compiled with CuPy's options when they are first asked for.

    Args:
        folder: for the compilers' output.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._nvrtc = _nvrtc()

    def __missing__(self, architecture: int) -> list[Kernel]:
        sources = [s for s in SOURCES if architecture == ALL or s not in ONLY_ONCE]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(
                lambda source: list(_compile(self._nvrtc, self._folder, architecture, *source)),
                sources,
            )
            self[architecture] = [kernel for group in compiled for kernel in group]
        return self[architecture]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The kernels, each architecture compiled within the time of the first test that needs it."""
    return Compiled(tmp_path_factory.mktemp("cubin"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit_into_the_registers(kernels: Compiled, architecture: int) -> None:
    for kernel in kernels[architecture]:
        assert kernel.registers <= 128, kernel  # 2 blocks of 256 threads on a multiprocessor
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.report
        assert not kernel.count("LDL|STL"), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_pass_once_and_16_bytes_at_a_time(kernels: Compiled, architecture: int) -> None:
    found = {
        k.name: (k.count(r"LDG\.E\.128"), k.count(r"STG\.E\.128"))
        for k in kernels[architecture]
        if k.name in LATTICE_ACCESSES
    }
    once = re.compile(r"(none|bf16|fp16)_(sgd|adam)$|(sgd|adam)_(4|16)$")
    accesses = {
        name: expected
        for name, expected in (LATTICE_ACCESSES | OTHER_ACCESSES).items()
        if architecture == ALL or not once.search(name)
    }
    assert found == {name: n for name, n in accesses.items() if name in LATTICE_ACCESSES}
    for kernel in kernels[architecture]:
        if kernel.name in OTHER_ACCESSES:
            names = (r"LDG\.E\.128", r"STG\.E\.128", r"LDG\.E\.64", r"STG\.E\.64")
            expected = OTHER_ACCESSES[kernel.name]
            assert tuple(map(kernel.count, names))[: len(expected)] == expected, kernel
    assert set(accesses) <= {kernel.name for kernel in kernels[architecture]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_that_others_write_is_not_read_through_the_read_only_cache(
    kernels: Compiled, architecture: int
) -> None:
    for kernel in kernels[architecture]:
        assert kernel.count("LDG|LD") or kernel.name == "mpd_write_table", kernel
        assert not [name for name in kernel.instructions if "CONSTANT" in name], kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_warps_do_not_synchronize_or_share_memory(kernels: Compiled, architecture: int) -> None:
    for kernel in kernels[architecture]:
        assert not kernel.count(r"BAR|ATOM|RED\.|LDS|STS"), kernel
        if kernel.name in LATTICE_ACCESSES:
            assert kernel.count("REDUX"), kernel
        assert "smem" not in kernel.report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_flushed_or_contracted(kernels: Compiled, architecture: int) -> None:
    for kernel in kernels[architecture]:
        # Their iterations use both, harmlessly: numbers near the ends of the range go another way.
        kind = kernel.name.split("_")[-2 if kernel.name in LATTICE_ACCESSES else -1]
        divides = kernel.name == "mpd_learn" or kind == "adam"
        iterations = kernel.count("MUFU") * (5 if divides else 2)
        written = WRITTEN.get(kind, 0) * (32 if kernel.name in LATTICE_ACCESSES else 16)
        assert kernel.count(r"F\w+\.FTZ") <= iterations / 2, kernel
        assert written <= kernel.count("FFMA") <= written + iterations, kernel
        if kernel.name in LATTICE_ACCESSES:
            assert kernel.count("FADD|FMUL") >= 64


def test_no_instruction_flushes_denormal_numbers() -> None:
    """Of those that NVRTC writes; CuPy has it flush wherever an instruction is not named."""
    nvrtc, flushing = _nvrtc(), set()
    for program in PROGRAMS:
        options = (*CUPY_OPTIONS, "-DMPD_BITS=8", "-arch=compute_90")
        handle, _ = _compiled(nvrtc, program.source, options)
        flushing |= set(re.findall(r"[\w.]+\.ftz[\w.]*", _output(nvrtc, "PTX", handle).decode()))
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))
    # A scale is not denormal, nor are the ends of half precision, which numbers are compared with.
    assert flushing == {"rcp.rn.ftz.f32", "setp.gt.ftz.f32", "setp.lt.ftz.f32"}


def _compile(
    nvrtc: ctypes.CDLL,
    folder: Path,
    architecture: int,
    compiled: Program,
    defines: tuple[str, ...],
) -> Iterator[Kernel]:
    options = [*CUPY_OPTIONS, *defines]
    options += [f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
    program, log = _compiled(nvrtc, compiled.source, options)
    cubin = folder / f"sm_{architecture}_{SOURCES.index((compiled, defines))}.cubin"
    cubin.write_bytes(_output(nvrtc, "CUBIN", program))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    disassembler = _files("nvidia-cuda-nvdisasm", r"nvdisasm(\.exe)?")[0]
    done = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True)
    parts = re.split(r"^\.text\.(\w+):$", done.stdout, flags=re.MULTILINE)
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    for report in log.split("Compiling entry function '")[1:]:
        name = report.partition("'")[0]
        registers = re.search(r"Used (\d+) registers", report)
        assert registers is not None, report
        instructions = re.findall(
            r"^\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", code[name], re.MULTILINE
        )
        yield Kernel(name, int(registers[1]), report, Counter(instructions))


def _compiled(
    nvrtc: ctypes.CDLL, source: str, options: Sequence[str]
) -> tuple[ctypes.c_void_p, str]:
    """Return a program of NVRTC's, and what its compilation said."""
    program = ctypes.c_void_p()
    text = source.encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"kernels.cu", 0, None, None)
    texts = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), texts)
    log = _output(nvrtc, "ProgramLog", program).decode()
    assert status == 0, log
    return program, log


def _output(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert not nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    assert not nvrtc[f"nvrtcGet{what}"](program, buffer)
    return buffer.raw


def _nvrtc() -> ctypes.CDLL:
    """Load the compiler, after the library that it would not find by itself."""
    for library in _files("nvidia-cuda-nvrtc", r"libnvrtc-builtins\.so[.\d]*"):
        ctypes.CDLL(str(library))
    return ctypes.CDLL(str(_files("nvidia-cuda-nvrtc", r"libnvrtc\.so[.\d]*")[0]))


def _files(package: str, name: str) -> list[Path]:
    """Return the files of an installed package that have this name."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        missing(f"{package} is not installed: `make test` installs it")
    return [Path(str(file.locate())) for file in files if re.fullmatch(name, file.name)]
