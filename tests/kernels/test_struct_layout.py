"""Structs and constants that C++ and CUDA declare and Python mirrors: both sides must agree.

The compiled libraries report sizes, offsets and constants (``mpd_struct_layout``).
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpi_dasgd.codecs.native_state import (
    BucketCountsStruct,
    PairCodecStruct,
    ScaleStruct,
    SeedsStruct,
)
from mpi_dasgd.kernels import cpu, cuda, native, optimizer_step
from mpi_dasgd.kernels.cuda import optimizer, pair_average, program, scale, table
from mpi_dasgd.kernels.encoded import BUCKET, BUCKET_STATS, EncodedVectorStruct
from mpi_dasgd.storage import schema
from mpi_dasgd.storage.record_ring import RING, row_dtype
from mpi_dasgd.transport.counters import Counters
from mpi_dasgd.transport.rma.launched_release import MAX_SWAPS, RELEASE, SWAP
from mpi_dasgd.transport.rma.native_exchange import (
    DIVERGED,
    PairExchangeSetupStruct,
    PairResultStruct,
)
from mpi_dasgd.transport.rma.native_rank import ArrivalStruct, NodeSetupStruct
from mpi_dasgd.transport.rma.step_words import StepWordsStruct
from tests.support.cuda_build import build
from tests.support.mpi_ranks import ROOT

Layout = dict[str, tuple[int, ...]]

SHARED: Layout = {"MPD_BUCKET": (BUCKET,)}


def mirror(name: str, struct: np.dtype | type[ctypes.Structure]) -> Layout:
    """Return size, and offset and size of each field, of a mirror of the struct `name`."""
    dtype = np.dtype(struct)
    fields = dtype.fields or {}
    places = {f"{name}.{field}": (at[1], at[0].itemsize) for field, at in fields.items()}
    return {name: (dtype.itemsize,), **places}


def compiled(library: ctypes.CDLL) -> Layout:
    """Return what the library reports, in the form of `mirror`."""
    library.mpd_struct_layout.restype = ctypes.c_char_p
    lines = [line.split() for line in library.mpd_struct_layout().decode().splitlines()]
    layout = {name: tuple(map(int, numbers)) for name, *numbers in lines}
    assert len(layout) == len(lines)
    return layout


SHARED |= mirror("MpdEncodedVector", EncodedVectorStruct)
SHARED |= mirror("MpdBucketStats", BUCKET_STATS)


@pytest.mark.skipif(native.load() is None, reason=native.status())
def test_cpu_structs_are_those_of_python() -> None:
    library = native.load()
    assert library is not None
    passes = {f"k{name.capitalize()}": (number,) for number, name in enumerate(cpu.PASSES)}
    step = mirror("MpdFusedStep", cpu.FusedStepStruct)
    step |= mirror("MpdOptimizer", optimizer_step.OptimizerStruct)
    step |= mirror("MpdOptimizerGroup", optimizer_step.GROUP)
    step |= mirror("MpdOptimizerSegment", optimizer_step.SEGMENT)
    step |= {
        f"k{name.capitalize()}": (getattr(optimizer_step, name),)
        for name in ("SGD", "ADAM", *optimizer_step.FLAGS)
    }
    step["MPD_TORCH_VECTOR"] = (optimizer_step.TORCH_VECTOR,)
    swaps = mirror("MpdSwap", SWAP) | mirror("MpdRelease", RELEASE)
    swaps["MPD_MAX_SWAPS"] = (MAX_SWAPS,)
    rows = mirror("MpdExchangeRow", row_dtype("exchange")) | mirror("MpdRecordRing", RING)
    for kind in ("INITIATED", "ABSORBED", "SKIPPED"):
        rows[f"MPD_{kind}"] = (getattr(schema, kind),)
    node = mirror("MpdNodeSetup", NodeSetupStruct) | mirror("MpdArrival", ArrivalStruct)
    node |= mirror("MpdTransportCounters", Counters)
    node |= mirror("MpdPairExchangeSetup", PairExchangeSetupStruct)
    node |= mirror("MpdPairResult", PairResultStruct) | mirror("MpdSeeds", SeedsStruct)
    node |= mirror("MpdAdaptiveScale", ScaleStruct) | mirror("MpdPairCodec", PairCodecStruct)
    node |= mirror("MpdBucketCounts", BucketCountsStruct)
    node["kDiverged"] = (DIVERGED % (1 << 64),)
    node |= mirror("MpdStepWords", StepWordsStruct)
    assert compiled(library) == {**SHARED, **step, **passes, **swaps, **rows, **node}


def test_cuda_structs_are_those_of_python(tmp_path: Path) -> None:
    build(tmp_path / "layout.so", "-O0")
    expected = {
        **SHARED,
        "MPD_MAX_DELTAS": (program.MAX_DELTAS,),
        "MPD_THREADS": (program.THREADS,),
        "MpdRange": (8,),
        **mirror("MpdKernelArguments", cuda.KERNEL_ARGUMENTS),
        **mirror("MpdScaleArguments", scale.SCALE_ARGUMENTS),
        **mirror("MpdAverageArguments", pair_average.AVERAGE_ARGUMENTS),
        **mirror("MpdOptimizerArguments", optimizer.OPTIMIZER_ARGUMENTS),
        **mirror("MpdTableArguments", table.TABLE_ARGUMENTS),
    }
    assert compiled(ctypes.CDLL(str(tmp_path / "layout.so"))) == expected


@pytest.mark.parametrize(
    "kernels", [cuda.LATTICE, scale.SCALE, pair_average.AVERAGE, optimizer.OPTIMIZER]
)
def test_an_argument_is_packed_as_its_struct(kernels: program.Program) -> None:
    """The format that packs it has the fields of the mirror: types, order and gaps."""
    rng = np.random.default_rng(1)
    expected = np.zeros(1, kernels.arguments)
    values = [_fill(expected, path, rng) for path in _paths(kernels.arguments)]
    assert kernels._packed.size == kernels.arguments.itemsize
    assert kernels._packed.pack(*values) == expected.tobytes()


def _paths(dtype: np.dtype) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to each number of a struct, in the order of its memory."""
    if dtype.fields is not None:
        for name, (field, *_) in dtype.fields.items():
            yield from ((name, *path) for path in _paths(field))
    elif dtype.subdtype is not None:
        item, (count,) = dtype.subdtype
        yield from ((i, *path) for i in range(count) for path in _paths(item))
    else:
        yield ()


def _fill(struct: np.ndarray, path: tuple[str | int, ...], rng: np.random.Generator) -> float:
    """Write a random value to a number of a struct, and return it."""
    *way, last = path
    for step in way:
        struct = struct[step] if isinstance(step, str) else struct[0, step]
    if isinstance(last, int):
        struct = struct[0]
    struct[last] = rng.integers(1, 1 << 20)
    return np.ravel(struct[last])[0].item()


@pytest.mark.parametrize("change", ["swapped", "missing", "wider"])
def test_a_mirror_that_differs_is_seen(change: str) -> None:
    """That the tests above can fail."""
    fields = list(EncodedVectorStruct._fields_)
    if change == "swapped":
        fields[0], fields[1] = fields[1], fields[0]
    elif change == "missing":
        del fields[-1]
    else:
        fields[1] = ("scales", ctypes.c_uint64 * 2)
    wrong = type("Wrong", (ctypes.Structure,), {"_fields_": fields})
    assert mirror("S", wrong) != mirror("S", EncodedVectorStruct)


def test_no_two_structs_have_one_name() -> None:
    kernels = ROOT / "mpi_dasgd" / "kernels"
    sources = [path for path in kernels.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    structs = Counter(
        name
        for path in sources
        for name in re.findall(r"^struct (\w+) \{", path.read_text(), re.MULTILINE)
    )
    assert {"MpdEncodedVector", "MpdFusedStep", "MpdScaleArguments"} < set(structs)
    assert {name for name, count in structs.items() if count > 1} == set()


def test_the_bucket_size_is_written_once_per_language() -> None:
    kernels = ROOT / "mpi_dasgd" / "kernels"
    for path in (*kernels.rglob("*.h"), *kernels.rglob("*.cpp"), *kernels.rglob("*.cu")):
        code = re.sub(r"//.*", "", path.read_text())
        lines = [line for line in code.splitlines() if re.search(r"\b102[34]\b", line)]
        allowed = ["#define MPD_BUCKET 1024"] if path.name == "layout.h" else []
        if path.name == "pair_average.cpp":  # a block of an unquantized model, which has no buckets
            allowed = ["constexpr int64_t kBlock = 1024;"]
        assert [line.strip() for line in lines] == allowed, path
