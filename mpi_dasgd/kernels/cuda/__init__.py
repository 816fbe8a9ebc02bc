"""The lattice codec on a GPU: ``lattice.cu``, compiled by CuPy at its first use.

The arrays are CuPy's; a torch tensor becomes one without a copy by
``cupy.from_dlpack(tensor.detach())``. Work is enqueued on CuPy's current device and stream, and not
waited for. To use torch's stream:
``with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream): ...``
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import (
    Array,
    EncodedVector,
    EncodedVectorStruct,
    FusedStep,
    buckets_of,
)

__all__ = ["KERNEL_ARGUMENTS", "MAX_DELTAS", "OPTIONS", "THREADS", "run", "source"]

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted operation is rounded differently
THREADS = 256
"""Threads per block, MPD_THREADS of ``lattice.cu``: 8 warps with a bucket each."""
MAX_DELTAS = 4
"""Deltas that one launch can absorb, MPD_MAX_DELTAS of ``lattice.cu``."""

_BLOCKS = 8  # per multiprocessor, if there are enough buckets; 2 to 4 of them are resident at once
_SOURCE = Path(__file__).with_name("lattice.cu")
_POINTER = np.uint64
_VECTOR = np.dtype(EncodedVectorStruct)
KERNEL_ARGUMENTS = np.dtype(
    [
        ("x", _POINTER), ("elements", np.int64),
        *((name, _VECTOR) for name in ("partner_model", "reply_delta", "publication")),
        ("deltas", _VECTOR, MAX_DELTAS), ("delta_stats", _POINTER, MAX_DELTAS),
        *((name, _POINTER) for name in ("stats", "velocity", "gradient")),
        *((name, np.float32) for name in ("weight", "lr", "momentum", "weight_decay")),
        ("delta_count", np.int32), ("subtract_dither", np.int32),
    ],
    align=True,
)  # fmt: skip
"""Mirror of MpdKernelArguments of ``lattice.cu``."""


def run(step: FusedStep) -> None:
    """Enqueue `step` on the current stream.

    Raises:
        UserError: the model, its velocity or gradient, or codes are not aligned as the kernels
            access them.
    """
    if step.x.size == 0:
        return
    import cupy

    _check_alignment(step)
    blocks = _BLOCKS * cupy.cuda.Device().attributes["MultiProcessorCount"]
    blocks = min(blocks, -(-buckets_of(step.x.size) // (THREADS // 32)))
    for name, arguments in _launches(step):
        _kernel(name, step.bits)((blocks,), (THREADS,), (arguments,))


def source() -> str:
    """Return the whole source as one text, so that CuPy's disk cache notices an edited header."""
    return _with_headers(_SOURCE)


def _with_headers(path: Path) -> str:
    def header(include: re.Match[str]) -> str:
        return _with_headers(path.parent / include[1])

    return re.sub(r'^#include "(.*)"$', header, path.read_text(), flags=re.MULTILINE)


@cache
def _kernel(name: str, bits: int) -> Callable[..., None]:
    function: Callable[..., None] = _module(bits).get_function(f"mpd_{name}_{bits}")
    return function


@cache
def _module(bits: int) -> Any:
    import cupy

    return cupy.RawModule(code=source(), options=(*OPTIONS, f"-DMPD_BITS={bits}"))


def _launches(step: FusedStep) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the launches that make up a step, in order: name of the kernel, and its argument."""
    all_stats = step.delta_stats or (None,) * len(step.deltas)
    deltas = list(zip(step.deltas, all_stats, strict=True))
    partner_model, publication = step.partner_model, step.publication
    merging = partner_model is not None and step.merge != 0
    if step.velocity is not None:
        alone = not deltas and partner_model is None
        yield "sgd_encode", _arguments(step, publication=publication if alone else None)
        if alone:
            return
    while len(deltas) > (0 if merging else MAX_DELTAS):
        first, deltas = deltas[:MAX_DELTAS], deltas[MAX_DELTAS:]
        yield "apply" if len(first) == 1 else "fused", _arguments(step, first)
    if merging:
        name = "merge" if publication is None else "merge_forward"
    elif len(deltas) + (partner_model is not None) + (publication is not None) > 1:
        name = "fused"
    elif deltas:
        name = "apply"
    elif partner_model is not None:
        name = "exchange"
    elif publication is not None:
        name = "encode"
    else:
        return
    yield name, _arguments(step, deltas, partner_model, publication)


def _arguments(
    step: FusedStep,
    deltas: Sequence[tuple[EncodedVector, Array | None]] = (),
    partner_model: EncodedVector | None = None,
    publication: EncodedVector | None = None,
) -> np.ndarray:
    """Return the argument of a kernel, passed by value, that does these parts of a step."""
    arguments = np.zeros(1, KERNEL_ARGUMENTS)
    fields = arguments[0]
    fields["x"], fields["elements"] = step.x.data.ptr, step.x.size
    for i, (delta, stats) in enumerate(deltas):
        fields["deltas"][i] = _vector(delta)
        fields["delta_stats"][i] = _address(stats)
    fields["delta_count"] = len(deltas)
    if partner_model is not None:
        fields["partner_model"], fields["stats"] = _vector(partner_model), _address(step.stats)
        fields["weight"], fields["subtract_dither"] = step.weight, step.merge == 2
        if step.reply_delta is not None and step.merge == 0:
            fields["reply_delta"] = _vector(step.reply_delta)
    if step.velocity is not None:
        fields["velocity"], fields["gradient"] = _address(step.velocity), _address(step.gradient)
        for name in ("lr", "momentum", "weight_decay"):
            fields[name] = getattr(step, name)
    if publication is not None:
        fields["publication"] = _vector(publication)
    return arguments


def _vector(encoded: EncodedVector) -> tuple[int, ...]:
    """Return a vector as a value of `EncodedVectorStruct`; its addresses are looked up once."""
    if encoded.native is None:
        encoded.native = tuple(map(_address, (encoded.codes, encoded.scales, encoded.checksums)))
    return (*encoded.native, encoded.seed, encoded.nearest)


def _address(array: Array | None) -> int:
    return 0 if array is None else array.data.ptr


def _check_alignment(step: FusedStep) -> None:
    messages = (step.partner_model, step.reply_delta, step.publication, *step.deltas)
    codes = [("codes", m.codes, 8 if m.bits == 16 else 4) for m in messages if m is not None]
    vectors = ((name, getattr(step, name), 16) for name in ("x", "velocity", "gradient"))
    for name, array, alignment in (*vectors, *codes):
        if _address(array) % alignment:
            raise UserError(
                f"{name}: expected memory aligned to {alignment} bytes, got an address that is "
                f"{_address(array) % alignment} bytes past that; make a copy"
            )
