"""Replicas: algorithms in lockstep whose ranks all hold one model, and a look whether they do.

`allreduce` never averages models, so that what one rank alone has written to its own, or a rate
that differs, would stay for ever. Every `INTERVAL` steps each rank publishes a checksum of its
model, and compares it with those of the others one step later, when all have come to it. Nothing is
waited for.

The checksum is a projection of the model: the sum of its elements with random signs per position
modulo 1,024, others each time. Rounding of the last bits, which may differ between processors, is
far below the tolerance.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.device.base import Array, Device
from mpi_dasgd.device.host import HOST
from mpi_dasgd.errors import UserError
from mpi_dasgd.kernels.encoded import BUCKET

if TYPE_CHECKING:
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["INTERVAL", "ReplicaCheck"]

INTERVAL = 64
"""Steps between two checksums."""

_KEPT = 8  # own checksums
_SIGNS = np.where(np.random.default_rng(1).random(2 * BUCKET) < 0.5, -1.0, 1.0)
_TOLERANCE = 1e-3  # of the norm of the model


class ReplicaCheck:
    """Compares the models of ranks in lockstep.

    Args:
        endpoint: transport of this rank.
        x: its model, (padded,), an array of `device`.
        algorithm: name of the algorithm, for messages.
        device: where the model is.
    """

    def __init__(
        self, endpoint: RmaEndpoint, x: Array, algorithm: str, device: Device = HOST
    ) -> None:
        self._endpoint = endpoint
        self._x, self._device = x, device
        self._algorithm = algorithm
        # Own checksums by step, the last few: those of other nodes are known later.
        self._own: dict[int, tuple[float, float]] = {}

    def after_step(self, step: int) -> None:
        """Publish a checksum after step `step`, or compare those of the step before, if it is time.

        Raises:
            UserError: says which ranks have another model than the others.
        """
        phase = step % INTERVAL
        if phase == 0:
            projection, norm = self._project(step)
            self._endpoint.membership.publish_checksum(_pack(step, projection))
            self._own[step] = projection, norm
            self._own.pop(step - _KEPT * INTERVAL, None)
        elif phase == 1:
            self._endpoint.refresh_progress()
            self._compare(step - 1)

    def _project(self, step: int) -> tuple[float, float]:
        start = step // INTERVAL * 37 % BUCKET
        signs = _SIGNS[start : start + BUCKET]
        x = self._device.to_host(self._x)
        sums = x.reshape(-1, BUCKET).sum(0, dtype=x.dtype)
        return float(signs @ sums), float(np.sqrt(np.dot(x, x)))

    def _compare(self, step: int) -> None:
        found = {}
        for rank, word in enumerate(self._endpoint.membership.checksums):
            at, projection = _unpack(word)
            if at in self._own:
                own, norm = self._own[at]
                found[rank] = (projection - own) / max(norm, 1e-30)
        middle = sorted(found.values())[len(found) // 2] if found else 0.0
        differ = [rank for rank, p in found.items() if abs(p - middle) > _TOLERANCE]
        if differ:
            agree = [rank for rank in found if rank not in differ]
            raise UserError(
                f"model: after step {step} ranks {differ} have another one than ranks {agree}, but "
                f"{self._algorithm!r} needs the same on all and never averages it: was it written "
                "on one rank only, or do the learning rates differ? Do the same on all ranks, or "
                "call training.average() afterwards"
            )


def _pack(step: int, projection: float) -> int:
    """Return the control word of a checksum: 31 bits of the step, and a float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", np.float32(projection)))[0]
    return (step & 0x7FFFFFFF) << 32 | bits


def _unpack(word: int) -> tuple[int, float]:
    """Return what `_pack` has made a word of."""
    projection: float = struct.unpack("<f", struct.pack("<I", word & 0xFFFFFFFF))[0]
    return word >> 32, projection
