"""The lattice codec on a GPU: ``lattice.cu``, compiled by CuPy at its first use.

The arrays are CuPy's; a torch tensor becomes one without a copy by
``cupy.from_dlpack(tensor.detach())``. Work is enqueued on CuPy's current device and stream, and not
waited for. To use torch's stream:
``with cupy.cuda.Stream.from_external(torch.cuda.current_stream()): ...``
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mpi_dasgd.kernels.cuda.optimizer import NO_STAGE, STAGE, STAGE_FORMAT, begin
from mpi_dasgd.kernels.cuda.program import (
    MAX_DELTAS,
    POINTER,
    THREADS,
    Program,
    address,
    aligned,
    multiprocessors,
)
from mpi_dasgd.kernels.encoded import (
    BITS,
    Array,
    EncodedVector,
    EncodedVectorStruct,
    FusedStep,
    buckets_of,
)

__all__ = ["KERNEL_ARGUMENTS", "LATTICE", "run"]

_BLOCKS = 8  # per multiprocessor, if there are enough buckets; 2 to 4 of them are resident at once
_VECTOR = np.dtype(EncodedVectorStruct)
KERNEL_ARGUMENTS = np.dtype(
    [
        ("x", POINTER), ("elements", np.int64),
        *((name, _VECTOR) for name in ("partner_model", "reply_delta", "publication")),
        ("deltas", _VECTOR, MAX_DELTAS), ("delta_stats", POINTER, MAX_DELTAS),
        ("stats", POINTER), ("weight", np.float32),
        ("delta_count", np.int32), ("subtract_dither", np.int32), ("optimizer", STAGE),
    ],
    align=True,
)  # fmt: skip
"""Mirror of MpdKernelArguments of ``lattice.cu``."""

LATTICE = Program(
    "lattice.cu",
    KERNEL_ARGUMENTS,
    f"=Qq{'QQQQq' * (3 + MAX_DELTAS)}{MAX_DELTAS + 1}Qf2i4x{STAGE_FORMAT}",
)
"""The kernels of ``lattice.cu``, with definitions of MPD_BITS and MPD_OPTIMIZER."""

_DEFINES = {bits: f"-DMPD_BITS={bits}" for bits in BITS}
_Vector = tuple[int, int, int, int, int]  # a value of `EncodedVectorStruct`
_NO_VECTOR: _Vector = (0, 0, 0, 0, 0)
_Delta = tuple[EncodedVector, Array | None]  # and its statistics


class _Launch(NamedTuple):
    """A kernel, and the parts of a step that it does."""

    name: str
    deltas: list[_Delta]
    partner_model: EncodedVector | None = None
    publication: EncodedVector | None = None


def run(step: FusedStep) -> None:
    """Enqueue `step` on the current stream.

    Raises:
        UserError: the model, the optimizer's state, a gradient or codes are not aligned as the
            kernels access them, or the device is too old.
    """
    size = step.x.size
    if size == 0:
        return
    bits = step.bits
    blocks = min(_BLOCKS * multiprocessors(), -(-buckets_of(size) // (THREADS // 32)))
    # All are described, and so checked, before the first is enqueued.
    launches = [(launch.name, _values(step, launch)) for launch in _launches(step)]
    stage = NO_STAGE
    if step.optimizer is not None:
        alone = not launches or launches[0][0].startswith("merge")
        stage = begin(step.optimizer, step.x, alone=alone)
    for name, values in launches:
        kernel = f"mpd_fused_{stage.kind}_{bits}" if stage.kind else f"mpd_{name}_{bits}"
        LATTICE.launch(kernel, (_DEFINES[bits], stage.define), blocks, *values, *stage.values)
        stage = NO_STAGE


def _launches(step: FusedStep) -> Iterator[_Launch]:
    """Yield the launches that make up a step, in order, but for those of an optimizer alone."""
    all_stats = step.delta_stats or (None,) * len(step.deltas)
    deltas = list(zip(step.deltas, all_stats, strict=True))
    partner_model, publication = step.partner_model, step.publication
    merging = partner_model is not None and step.merge != 0
    while len(deltas) > (0 if merging else MAX_DELTAS):
        first, deltas = deltas[:MAX_DELTAS], deltas[MAX_DELTAS:]
        yield _Launch("apply" if len(first) == 1 else "fused", first)
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
    yield _Launch(name, deltas, partner_model, publication)


def _values(step: FusedStep, launch: _Launch) -> tuple[float, ...]:
    """Return the fields of the argument of a launch, of `KERNEL_ARGUMENTS` but for the stage."""
    x = aligned("x", step.x, 16)
    partner = reply = publication = _NO_VECTOR
    stats, weight, subtract = 0, 0.0, False
    if launch.partner_model is not None:
        partner, stats = _vector(launch.partner_model), address(step.stats)
        weight, subtract = step.weight, step.merge == 2
        if step.reply_delta is not None and step.merge == 0:
            reply = _vector(step.reply_delta)
    if launch.publication is not None:
        publication = _vector(launch.publication)
    deltas: list[int] = []
    delta_stats: list[int] = []
    for delta, found in launch.deltas:
        deltas += _vector(delta)
        delta_stats.append(address(found))
    absent = MAX_DELTAS - len(delta_stats)
    return (
        x, step.x.size, *partner, *reply, *publication,
        *deltas, *_NO_VECTOR * absent, *delta_stats, *(0,) * absent,
        stats, weight, len(delta_stats), subtract,
    )  # fmt: skip


def _vector(encoded: EncodedVector) -> _Vector:
    """Return the struct of a vector; its addresses are looked up, and checked, once."""
    arrays: tuple[int, int, int] | None = encoded.native
    if arrays is None:
        codes = aligned("codes", encoded.codes, 8 if encoded.bits == 16 else 4)
        arrays = encoded.native = codes, address(encoded.scales), address(encoded.checksums)
    return (*arrays, encoded.seed, encoded.nearest)
