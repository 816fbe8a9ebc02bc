"""Fused pair averaging of unquantized, bf16 and fp16 models on a GPU: ``average.cu``.

The bits are those of `mpi_dasgd.kernels.pair_average.pair_average_numpy` for float32 payloads, and
of `mpi_dasgd.codecs.elementwise` for the others. Nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.cuda.optimizer import NO_STAGE, STAGE, STAGE_FORMAT, Stage, begin
from mpi_dasgd.kernels.cuda.program import (
    MAX_DELTAS,
    POINTER,
    THREADS,
    Program,
    address,
    aligned,
    multiprocessors,
)
from mpi_dasgd.kernels.encoded import Array
from mpi_dasgd.kernels.optimizer_step import OptimizerStep

__all__ = ["AVERAGE", "AVERAGE_ARGUMENTS", "pair_average"]

# Per multiprocessor: 16 warps, each with 2 to 4 KiB on their way, keep the memory busy.
_BLOCKS = 2
_WARP_ELEMENTS = 512  # that a warp processes at a time

AVERAGE_ARGUMENTS = np.dtype(
    [
        ("x", POINTER), ("elements", np.int64), ("partner_model", POINTER),
        ("deltas", POINTER, MAX_DELTAS),
        *((name, POINTER) for name in ("reply_delta", "publication", "partial", "square")),
        ("minus_weight", np.float32), ("delta_count", np.int32), ("warps", np.int32),
        ("optimizer", STAGE),
    ],
    align=True,
)  # fmt: skip
"""Mirror of MpdAverageArguments of ``average.cu``."""

AVERAGE = Program("average.cu", AVERAGE_ARGUMENTS, f"=Qq{1 + MAX_DELTAS + 4}Qf2i4x{STAGE_FORMAT}")
"""The kernels of ``average.cu``."""

_FORMATS = {  # by the payload's type: kernel, and alignment in bytes
    np.dtype(np.float32): ("mpd_average_none", 16),
    np.dtype(np.uint16): ("mpd_average_bf16", 8),
    np.dtype(np.float16): ("mpd_average_fp16", 8),
}


def pair_average(
    x: Array,
    deltas: Sequence[Array] = (),
    partner_model: Array | None = None,
    weight: float = 0.5,
    reply_delta: Array | None = None,
    publication: Array | None = None,
    square_out: Array | None = None,
    update: OptimizerStep | None = None,
) -> None:
    """Average `x` with a partner's model and write both results of the exchange::

        x += sum(decode(deltas))
        d = decode(partner_model) - x;  square_out = sum(d^2)
        r = encode(-weight * d)                 # only rounded if there is a reply
        x -= decode(r);  reply_delta = r;  publication = encode(x)

    Args:
        x: own model, float32, shape (elements,), aligned to 16 bytes; changed in place.
        deltas: payloads of the deltas to absorb first, in this order, shape (elements,). All
            payloads have one dtype, float32 (codec `none`), uint16 (`bf16`) or float16 (`fp16`),
            and are aligned to 4 of their elements.
        partner_model: payload of the model that the partner published, or None without a partner.
        weight: share of the distance to move.
        reply_delta: receives the partner's delta, or None.
        publication: receives the new `x`, or None.
        square_out: receives the squared distance to the partner's model before it is averaged,
            float64, shape (1,), on the device or in memory that is mapped to it; None: it is not
            measured. Without a partner it receives 0. Unlike all else it depends on the device, by
            the rounding of a sum.
        update: step of an optimizer on `x`, made before all else; None: there is none.

    Raises:
        UserError: an array is not aligned as the kernel accesses it, or has another size or dtype,
            or the device is too old for the kernels.
    """
    payloads = [*deltas, partner_model, reply_delta, publication]
    given = [payload for payload in payloads if payload is not None]
    if x.size == 0:
        return
    if not given:
        if update is not None:
            begin(update, x, alone=True)
        return
    dtype = given[0].dtype
    if dtype not in _FORMATS:
        raise UserError(f"payload: expected float32, uint16 (bf16) or float16, got {dtype}")
    name, alignment = _FORMATS[dtype]
    for payload in given:
        if payload.dtype != dtype or payload.size != x.size:
            raise UserError(
                f"payload: expected {dtype} of shape ({x.size},), as its model and the others, "
                f"got {payload.dtype} of shape {payload.shape}"
            )
    model = aligned("x", x, 16)
    at = [aligned("payload", payload, alignment) for payload in payloads]
    first, (partner, reply, published) = at[: len(deltas)], at[len(deltas) :]
    warps = THREADS // 32
    blocks = min(_BLOCKS * multiprocessors(), -(-x.size // (_WARP_ELEMENTS * warps)))
    stage = NO_STAGE if update is None else begin(update, x, alone=False)
    while len(first) > MAX_DELTAS:
        absorbed, first = first[:MAX_DELTAS], first[MAX_DELTAS:]
        _launch(name, blocks, stage, model, x.size, 0, *absorbed, 0, 0, 0, 0, 0.0, MAX_DELTAS, 0)
        stage = NO_STAGE
    missing = (0,) * (MAX_DELTAS - len(first))
    partial = square = 0
    if square_out is not None:
        partial, square = address(_partial(blocks * warps)), address(square_out)
    _launch(
        name, blocks, stage, model, x.size, partner, *first, *missing, reply, published, partial, 0,
        -weight, len(first), 0,
    )  # fmt: skip
    if square_out is not None:
        _launch(
            "mpd_square", 1, NO_STAGE, 0, 0, 0, *(0,) * MAX_DELTAS, 0, 0, partial, square, 0.0, 0,
            blocks * warps,
        )  # fmt: skip


def _launch(name: str, blocks: int, stage: Stage, *values: float) -> None:
    name = f"{name}_{stage.kind}" if stage.kind else name
    AVERAGE.launch(name, (stage.define,), blocks, *values, *stage.values)


def _partial(warps: int) -> Array:
    """Return memory for a number of each warp, which launches on other streams do not use."""
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    return _partial_of(warps, cupy.cuda.runtime.getDevice(), stream)


@cache
def _partial_of(warps: int, device: int, stream: int) -> Array:
    import cupy

    return cupy.zeros(warps, np.float64)
