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
from mpi_dasgd.kernels.encoded import Array, Coded, Step, buckets_of

__all__ = ["run", "source"]

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted operation is rounded otherwise
THREADS = 256  # a block, 8 buckets at a time; as __launch_bounds__ says
_BLOCKS = 8  # for each multiprocessor, where there is work for them; 2 to 4 of them fit at once
_ARRIVALS = 4  # deltas that one launch can absorb

_HERE = Path(__file__).parent
_POINTER = np.uint64
_MESSAGE = np.dtype(
    [
        *((name, _POINTER) for name in ("codes", "scales", "checks")),
        ("seed", np.uint64), ("nearest", np.int64),
    ],
    align=True,
)  # fmt: skip
_STEP = np.dtype(
    [
        ("x", _POINTER), ("elements", np.int64),
        *((name, _MESSAGE) for name in ("theirs", "reply", "published")),
        ("arrived", _MESSAGE, _ARRIVALS), ("arrived_found", _POINTER, _ARRIVALS),
        *((name, _POINTER) for name in ("found", "velocity", "gradient")),
        *((name, np.float32) for name in ("weight", "rate", "momentum", "decay")),
        ("arrivals", np.int32), ("subtract", np.int32),
    ],
    align=True,
)  # fmt: skip


def run(step: Step) -> None:
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


def _calls(step: Step) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the launches that make up a step, in order: the name of the kernel, and its argument."""
    founds = step.arrived_found or (None,) * len(step.arrived)
    arrived = list(zip(step.arrived, founds, strict=True))
    theirs, published = step.theirs, step.published
    merging = theirs is not None and step.merge != 0
    if step.velocity is not None:
        alone = not arrived and theirs is None
        yield "sgd_encode", _call(step, published=published if alone else None)
        if alone:
            return
    while len(arrived) > (0 if merging else _ARRIVALS):
        first, arrived = arrived[:_ARRIVALS], arrived[_ARRIVALS:]
        yield "apply" if len(first) == 1 else "fused", _call(step, first)
    if merging:
        name = "merge" if published is None else "merge_forward"
    elif len(arrived) + (theirs is not None) + (published is not None) > 1:
        name = "fused"
    elif arrived:
        name = "apply"
    elif theirs is not None:
        name = "exchange"
    elif published is not None:
        name = "encode"
    else:
        return
    yield name, _call(step, arrived, theirs, published)


def _call(
    step: Step,
    arrived: Sequence[tuple[Coded, Array | None]] = (),
    theirs: Coded | None = None,
    published: Coded | None = None,
) -> np.ndarray:
    """Return the argument of a kernel that does these parts of a step: a struct, passed by value."""
    call = np.zeros(1, _STEP)
    here = call[0]
    here["x"], here["elements"] = step.x.data.ptr, step.x.size
    for i, (delta, found) in enumerate(arrived):
        here["arrived"][i] = _message(delta)
        here["arrived_found"][i] = _address(found)
    here["arrivals"] = len(arrived)
    if theirs is not None:
        here["theirs"], here["found"] = _message(theirs), _address(step.found)
        here["weight"], here["subtract"] = step.weight, step.merge == 2
        if step.reply is not None and step.merge == 0:
            here["reply"] = _message(step.reply)
    if step.velocity is not None:
        here["velocity"], here["gradient"] = _address(step.velocity), _address(step.gradient)
        here["rate"], here["momentum"], here["decay"] = step.rate, step.momentum, step.decay
    if published is not None:
        here["published"] = _message(published)
    return call


def _message(coded: Coded) -> tuple[int, ...]:
    """Return a message as a value of `_MESSAGE`; its addresses are looked up once."""
    if coded.native is None:
        coded.native = tuple(map(_address, (coded.codes, coded.scales, coded.checks)))
    return (*coded.native, coded.seed, coded.nearest)


def _address(array: Array | None) -> int:
    return 0 if array is None else array.data.ptr


def _check_alignment(step: Step) -> None:
    messages = (step.theirs, step.reply, step.published, *step.arrived)
    codes = [("codes", m.codes, 8 if m.bits == 16 else 4) for m in messages if m is not None]
    vectors = ((name, getattr(step, name), 16) for name in ("x", "velocity", "gradient"))
    for name, array, alignment in (*vectors, *codes):
        if _address(array) % alignment:
            raise UserError(
                f"{name}: expected memory aligned to {alignment} bytes, got an address that is "
                f"{_address(array) % alignment} bytes past that; make a copy"
            )
