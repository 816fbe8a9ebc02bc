"""Fused pair averaging of unquantized, bf16 and fp16 models on a GPU: ``average.cu``.

The bits are those of `mpi_dasgd.kernels.pair_average.pair_average_numpy` for float32 payloads, and
of `mpi_dasgd.codecs.elementwise` for the others. Nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpi_dasgd.kernels.encoded import Array

__all__ = ["pair_average"]


def pair_average(
    x: Array,
    deltas: Sequence[Array] = (),
    partner_model: Array | None = None,
    weight: float = 0.5,
    reply_delta: Array | None = None,
    publication: Array | None = None,
    square_out: Array | None = None,
) -> None:
    """Average `x` with a partner's model and write both results of the exchange::

        x += sum(decode(deltas))
        d = decode(partner_model) - x;  square_out = sum(d^2)
        r = encode(-weight * d)                 # only rounded if there is a reply
        x -= decode(r);  reply_delta = r;  publication = encode(x)

    Args:
        x: own model, float32, shape (elements,); changed in place. It, and all payloads, are
            aligned to 16 bytes.
        deltas: payloads of the deltas to absorb first, in this order, shape (elements,). All
            payloads have one dtype: float32 (codec `none`), uint16 (`bf16`) or float16 (`fp16`).
        partner_model: payload of the model that the partner published, or None without a partner.
        weight: share of the distance to move.
        reply_delta: receives the partner's delta, or None.
        publication: receives the new `x`, or None.
        square_out: receives the squared distance to the partner's model before it is averaged,
            float64, shape (1,), on the device or in memory that is mapped to it; None: it is not
            measured. Without a partner it receives 0.

    Raises:
        UserError: an array is not aligned as the kernel accesses it, or has another size or dtype.
    """
    raise NotImplementedError
