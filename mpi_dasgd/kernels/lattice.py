"""The lattice codec's operations, each one pass over memory, on the CPU (C++ or NumPy) or a GPU (CuPy).

Element by element, with scale s of the bucket, dither u in [-1/2, 1/2) (0 for nearest rounding) and
b bits (Davies et al., ICLR 2021, arXiv 2002.09268; bucket, check and shared dither are ours):

* **encode**: z = round(x/s + u); the code is z mod 2^b.
* **exchange**: d = signed_b(code - round(y/s + u)), with the *same* u: d rounds (x - y)/s up or down at
  random such that its mean is exact, and is 0 where the models agree. y += (w s) d, and the partner's
  delta is -(w s) d: the same integers d with the unit -w s, so both sides move by the same amounts.
* **apply**: y += unit * d.
* **merge**: y += w (s z - y) with z = round(y/s) + signed_b(code - round(y/s)): plain averaging.
  Subtracting the dither, s (z - u), lessens the error by sqrt(2).

Decoding is right while |x - y| <= (2^(b-1) - 1) s in every element (merge: 2.5 less). Where it is not, the
check of the bucket fails: the model's bucket stays as it was, and the delta's bucket is 0, with unit 0.
The same holds for NaN, infinities, and |x| >= 2^22 s, in either model.

All functions take vectors of any length, and the arrays of one device. They raise
`mpi_dasgd.errors.UserError` for arrays or messages that do not belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native, reference
from mpi_dasgd.kernels.encoded import Array, Coded, Step

__all__ = ["apply", "backend_of", "encode", "exchange", "fused", "merge", "sgd_encode"]


def backend_of(array: Array) -> ModuleType:
    """Return the backend for an array: its module has ``run(step)``.

    Raises:
        UserError: it is neither a NumPy nor a CuPy array.
    """
    if isinstance(array, np.ndarray):
        if native.load() is None:
            return reference
        from mpi_dasgd.kernels import cpu

        return cpu
    if type(array).__module__.split(".")[0] == "cupy":
        from mpi_dasgd.kernels import cuda

        return cuda
    raise UserError(f"array: expected one of NumPy or CuPy, got {type(array)}")


def encode(x: Array, out: Coded, *, threads: int = 1) -> None:
    """Write the codes of `x` to `out`, whose scales, seed and rounding are given.

    Args:
        x: float32, shape (elements,).
        out: receives codes and checks.
        threads: to share the buckets; the result does not depend on it.
    """
    step = Step(x, threads)
    step.published = out
    _run(step)


def exchange(
    x: Array,
    theirs: Coded,
    weight: float = 0.5,
    reply: Coded | None = None,
    found: Array | None = None,
    *,
    threads: int = 1,
) -> None:
    """Move `x` towards a publication on its lattice, and write the delta by which the partner moves.

    Args:
        x: float32, shape (elements,); changed in place.
        theirs: the partner's publication.
        weight: w, share of the distance to move.
        reply: receives the partner's delta; its seed is given.
        found: receives the statistics, `FOUND`, shape (buckets,).
        threads: to share the buckets.
    """
    step = Step(x, threads)
    step.theirs, step.weight, step.reply, step.found = theirs, weight, reply, found
    _run(step)


def apply(x: Array, delta: Coded, found: Array | None = None, *, threads: int = 1) -> None:
    """Move `x` by a delta that `exchange` wrote on the partner's side; arguments as there."""
    step = Step(x, threads)
    step.arrived = (delta,)
    step.arrived_found = () if found is None else (found,)
    _run(step)


def merge(
    y: Array,
    theirs: Coded,
    weight: float = 0.5,
    found: Array | None = None,
    *,
    subtract_dither: bool = False,
    forward: Coded | None = None,
    threads: int = 1,
) -> None:
    """Average `y` with a decoded publication; only this side moves.

    Args:
        y: float32, shape (elements,); changed in place.
        theirs, weight, found, threads: as for `exchange`.
        subtract_dither: decode to s (z - u), whose error is uniform and smaller by sqrt(2).
        forward: receives the codes of the new `y`, in the same pass; as `out` of `encode`.
    """
    step = Step(y, threads)
    step.theirs, step.weight, step.found = theirs, weight, found
    step.merge = 2 if subtract_dither else 1
    step.published = forward
    _run(step)


def sgd_encode(
    x: Array,
    velocity: Array,
    gradient: Array,
    out: Coded,
    rate: float,
    momentum: float = 0.0,
    decay: float = 0.0,
    *,
    threads: int = 1,
) -> None:
    """One step of SGD, v = momentum v + (g + decay x), x -= rate v, and the codes of the new `x`.

    Args:
        x, velocity: float32, shape (elements,); changed in place.
        gradient: float32, shape (elements,).
        out, threads: as for `encode`.
        rate, momentum, decay: as lr, momentum and weight_decay of ``torch.optim.SGD``.
    """
    step = Step(x, threads)
    step.velocity, step.gradient = velocity, gradient
    step.rate, step.momentum, step.decay = rate, momentum, decay
    step.published = out
    _run(step)


def fused(
    x: Array,
    arrived: Sequence[Coded] = (),
    theirs: Coded | None = None,
    weight: float = 0.5,
    reply: Coded | None = None,
    published: Coded | None = None,
    *,
    arrived_found: Sequence[Array] = (),
    found: Array | None = None,
    threads: int = 1,
) -> None:
    """`apply` every delta that has arrived, `exchange`, and `encode`: the whole pair exchange, one pass.

    Args:
        x: float32, shape (elements,); changed in place.
        arrived: deltas, applied in this order; `arrived_found` their statistics.
        theirs, weight, reply, found: as for `exchange`; `theirs` None leaves it out.
        published: as `out` of `encode`; None leaves it out.
        threads: to share the buckets.
    """
    step = Step(x, threads)
    step.arrived, step.arrived_found = tuple(arrived), tuple(arrived_found)
    step.theirs, step.weight, step.reply, step.found = theirs, weight, reply, found
    step.published = published
    _run(step)


def _run(step: Step) -> None:
    step.check()
    backend_of(step.x).run(step)
