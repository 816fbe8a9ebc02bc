"""Operations of the lattice codec, each one pass over memory.

They run on the CPU (C++, or NumPy without a compiler) or on a GPU (CuPy).

Per element, with scale s of the bucket, dither u in [-1/2, 1/2) (0 for rounding to the nearest) and
b bits (Davies et al., ICLR 2021, arXiv 2002.09268; bucket, checksum and shared dither are ours):

* **encode**: z = round(x/s + u); the code is z mod 2^b.
* **exchange**: d = signed_b(code - round(y/s + u)), with the *same* u: d rounds (x - y)/s up or
  down at random such that its mean is exact, and is 0 where the models agree. y += (w s) d, and the
  partner's delta is -(w s) d: the same integers d with the unit -w s, so both sides move by the
  same amounts.
* **apply**: y += unit * d.
* **merge**: y += w (s z - y) with z = round(y/s) + signed_b(code - round(y/s)): plain averaging.
  Subtracting the dither, s (z - u), reduces the error by a factor of sqrt(2).

Decoding is correct while |x - y| <= (2^(b-1) - 1) s in every element (merge: 2.5 less). Otherwise
the checksum of the bucket fails: the model's bucket is left unchanged, and the delta's bucket is 0,
with unit 0. The same holds for NaN, infinities, and |x| >= 2^22 s, in either model.

All functions take vectors of any length; all arrays of a call are on the same device. They raise
`mpi_dasgd.errors.UserError` for arrays or messages that do not belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels import native, reference
from mpi_dasgd.kernels.encoded import Array, EncodedVector, FusedStep

__all__ = ["apply", "backend_of", "encode", "exchange", "fused", "merge"]


def backend_of(array: Array) -> ModuleType:
    """Return the backend for an array: a module with ``run(step)``.

    Raises:
        UserError: it is neither a NumPy nor a CuPy array.
    """
    if type(array).__module__.split(".")[0] == "cupy":
        from mpi_dasgd.kernels import cuda

        return cuda
    if isinstance(array, np.ndarray):
        if native.load() is None:
            return reference
        from mpi_dasgd.kernels import cpu

        return cpu
    raise UserError(f"array: expected one of NumPy or CuPy, got {type(array)}")


def encode(x: Array, out: EncodedVector, *, threads: int = 1) -> None:
    """Write the codes of `x` to `out`, whose scales, seed and rounding are given.

    Args:
        x: model, float32, shape (elements,).
        out: receives codes and checksums.
        threads: number of CPU threads that share the buckets; the result does not depend on it.
    """
    step = FusedStep(x, threads)
    step.publication = out
    _run(step)


def exchange(
    x: Array,
    partner_model: EncodedVector,
    weight: float = 0.5,
    reply_delta: EncodedVector | None = None,
    stats: Array | None = None,
    *,
    threads: int = 1,
) -> None:
    """Move `x` towards a publication on its lattice, and write the delta for the partner.

    Args:
        x: model, float32, shape (elements,); changed in place.
        partner_model: publication of the partner.
        weight: w, share of the distance to move.
        reply_delta: receives the partner's delta; its seed is given.
        stats: receives the statistics, `BUCKET_STATS`, shape (buckets,).
        threads: as for `encode`.
    """
    step = FusedStep(x, threads)
    step.partner_model, step.weight = partner_model, weight
    step.reply_delta, step.stats = reply_delta, stats
    _run(step)


def apply(x: Array, delta: EncodedVector, stats: Array | None = None, *, threads: int = 1) -> None:
    """Move `x` by a delta that `exchange` wrote on the partner's side; arguments as there."""
    step = FusedStep(x, threads)
    step.deltas = (delta,)
    step.delta_stats = () if stats is None else (stats,)
    _run(step)


def merge(
    y: Array,
    partner_model: EncodedVector,
    weight: float = 0.5,
    stats: Array | None = None,
    *,
    subtract_dither: bool = False,
    forward: EncodedVector | None = None,
    threads: int = 1,
) -> None:
    """Average `y` with a decoded publication; only this side moves.

    Args:
        y: model, float32, shape (elements,); changed in place.
        partner_model, weight, stats, threads: as for `exchange`.
        subtract_dither: decode to s (z - u), whose error is uniform and smaller by sqrt(2).
        forward: receives the codes of the new `y`, in the same pass; as `out` of `encode`.
    """
    step = FusedStep(y, threads)
    step.partner_model, step.weight, step.stats = partner_model, weight, stats
    step.merge = 2 if subtract_dither else 1
    step.publication = forward
    _run(step)


def fused(
    x: Array,
    deltas: Sequence[EncodedVector] = (),
    partner_model: EncodedVector | None = None,
    weight: float = 0.5,
    reply_delta: EncodedVector | None = None,
    publication: EncodedVector | None = None,
    *,
    delta_stats: Sequence[Array] = (),
    stats: Array | None = None,
    threads: int = 1,
) -> None:
    """`apply` all deltas, `exchange`, and `encode`: the whole pair exchange in one pass.

    Args:
        x: model, float32, shape (elements,); changed in place.
        deltas: received deltas, applied in this order.
        partner_model, weight, reply_delta, stats: as for `exchange`; without `partner_model` there
            is no exchange.
        publication: as `out` of `encode`; None leaves it out.
        delta_stats: receives the statistics of each delta, `BUCKET_STATS`, shape (buckets,) each.
        threads: as for `encode`.
    """
    step = FusedStep(x, threads)
    step.deltas, step.delta_stats = tuple(deltas), tuple(delta_stats)
    step.partner_model, step.weight = partner_model, weight
    step.reply_delta, step.stats = reply_delta, stats
    step.publication = publication
    _run(step)


def _run(step: FusedStep) -> None:
    step.validate()
    backend_of(step.x).run(step)
