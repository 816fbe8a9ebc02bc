"""The lattice codec on a GPU: ``lattice.cu``, compiled by CuPy when it is first used.

The arrays are CuPy's; a torch tensor becomes one without a copy, ``cupy.from_dlpack(tensor.detach())``.
Work is put on CuPy's current device and stream, and not waited for. On torch's stream:
``with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream): ...``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import Array, EncodedVector, FusedStep, buckets_of

__all__ = ["run", "source"]

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted operation is rounded otherwise
THREADS = 256  # a block, 8 buckets at a time; as __launch_bounds__ says
_BLOCKS = 8  # for each multiprocessor, where there is work for them; 2 to 4 of them fit at once
_ARRIVALS = 4  # deltas that one launch can absorb

_HERE = Path(__file__).parent
_POINTER = np.uint64
_MESSAGE = np.dtype(
    [
        *((name, _POINTER) for name in ("codes", "scales", "checksums")),
        ("seed", np.uint64), ("nearest", np.int64),
    ],
    align=True,
)  # fmt: skip
_STEP = np.dtype(
    [
        ("x", _POINTER), ("elements", np.int64),
        *((name, _MESSAGE) for name in ("partner_model", "reply_delta", "publication")),
        ("deltas", _MESSAGE, _ARRIVALS), ("delta_stats", _POINTER, _ARRIVALS),
        *((name, _POINTER) for name in ("stats", "velocity", "gradient")),
        *((name, np.float32) for name in ("weight", "rate", "momentum", "decay")),
        ("arrivals", np.int32), ("subtract", np.int32),
    ],
    align=True,
)  # fmt: skip


def run(step: FusedStep) -> None:
    """Put what `step` says on the current stream.

    Raises:
        UserError: the model, its velocity or gradient, or codes are not aligned to the kernels' accesses.
    """
    if step.x.size == 0:
        return
    import cupy

    _check_alignment(step)
    blocks = _BLOCKS * cupy.cuda.Device().attributes["MultiProcessorCount"]
    blocks = min(blocks, -(-buckets_of(step.x.size) // (THREADS // 32)))
    for name, call in _calls(step):
        _kernel(name, step.bits)((blocks,), (THREADS,), (call,))


def source() -> str:
    """Return all of the source as one text, so that CuPy's cache on disk notices an edited header."""
    text = (_HERE / "lattice.cu").read_text()
    for header in ("lane.h", "../lattice_math.h"):
        text = text.replace(f'#include "{header}"', (_HERE / header).read_text())
    return text


@cache
def _kernel(name: str, bits: int) -> Callable[..., None]:
    function: Callable[..., None] = _module(bits).get_function(f"mpd_{name}_{bits}")
    return function


@cache
def _module(bits: int) -> Any:
    import cupy

    return cupy.RawModule(code=source(), options=(*OPTIONS, f"-DMPD_BITS={bits}"))


def _calls(step: FusedStep) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the launches that make up a step, in order: the name of the kernel, and its argument."""
    stats_of_deltas = step.delta_stats or (None,) * len(step.deltas)
    deltas = list(zip(step.deltas, stats_of_deltas, strict=True))
    partner_model, publication = step.partner_model, step.publication
    merging = partner_model is not None and step.merge != 0
    if step.velocity is not None:
        alone = not deltas and partner_model is None
        yield "sgd_encode", _call(step, publication=publication if alone else None)
        if alone:
            return
    while len(deltas) > (0 if merging else _ARRIVALS):
        first, deltas = deltas[:_ARRIVALS], deltas[_ARRIVALS:]
        yield "apply" if len(first) == 1 else "fused", _call(step, first)
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
    yield name, _call(step, deltas, partner_model, publication)


def _call(
    step: FusedStep,
    deltas: Sequence[tuple[EncodedVector, Array | None]] = (),
    partner_model: EncodedVector | None = None,
    publication: EncodedVector | None = None,
) -> np.ndarray:
    """Return the argument of a kernel that does these parts of a step: a struct, passed by value."""
    call = np.zeros(1, _STEP)
    here = call[0]
    here["x"], here["elements"] = step.x.data.ptr, step.x.size
    for i, (delta, stats) in enumerate(deltas):
        here["deltas"][i] = _message(delta)
        here["delta_stats"][i] = _address(stats)
    here["arrivals"] = len(deltas)
    if partner_model is not None:
        here["partner_model"], here["stats"] = _message(partner_model), _address(step.stats)
        here["weight"], here["subtract"] = step.weight, step.merge == 2
        if step.reply_delta is not None and step.merge == 0:
            here["reply_delta"] = _message(step.reply_delta)
    if step.velocity is not None:
        here["velocity"], here["gradient"] = _address(step.velocity), _address(step.gradient)
        here["rate"], here["momentum"], here["decay"] = step.lr, step.momentum, step.weight_decay
    if publication is not None:
        here["publication"] = _message(publication)
    return call


def _message(encoded: EncodedVector) -> tuple[int, ...]:
    """Return a message as a value of `_MESSAGE`; its addresses are looked up once."""
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
