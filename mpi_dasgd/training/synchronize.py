"""Collective operations on the models of all ranks: before training, and after it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.device.base import Array
from mpi_dasgd.errors import Diverged, PeerLost
from mpi_dasgd.model.buffer_rules import combine, has_nan
from mpi_dasgd.model.flat_parameters import FlatParameters
from mpi_dasgd.model.model_buffers import ModelBuffers
from mpi_dasgd.model.tensor_bytes import read_bytes, write_bytes
from mpi_dasgd.training.agreement import require_agreement
from mpi_dasgd.training.surviving_ranks import SurvivingRanks

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["average_models", "broadcast_model", "combine_buffers", "copy_model"]

_log = logging.getLogger("mpi_dasgd")

_BLOCK = 1 << 24  # bytes of buffers of all ranks together that a rank holds at a time


def broadcast_model(comm: MPI.Intracomm, parameters: FlatParameters, buffers: ModelBuffers) -> None:
    """Copy parameters and buffers of rank 0 to all ranks, and verify the copies. Collective.

    Args:
        comm: communicator of all ranks, which agree on what their models consist of.
        parameters: parameters of this rank's model.
        buffers: its buffers; those that are kept stay as they are.

    Raises:
        PeerLost: a rank has other weights than rank 0 afterwards.
    """
    model = parameters.to_host(parameters.vector)
    comm.Bcast(model, root=0)
    parameters.set(model)
    tensors = buffers.shared()
    for name in _differing(comm, buffers):
        data = read_bytes(tensors[name]).copy()
        for start in range(0, data.size, _BLOCK):
            comm.Bcast(data[start : start + _BLOCK], root=0)
        write_bytes(tensors[name], data)
    digests = comm.allgather((parameters.digest(), buffers.digests()))
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise PeerLost(f"rank {rank} does not have the same initial weights as rank 0")


def average_models(
    comm: SurvivingRanks,
    parameters: FlatParameters,
    buffers: ModelBuffers,
    ranks: Collection[int],
    workers: Collection[int],
    *,
    model: Array | None = None,
    weight: float = 1.0,
    check_finite: bool = True,
) -> None:
    """Replace all models by the mean of those of `ranks` that live. Collective.

    Args:
        comm: the living ranks.
        parameters: parameters of this rank's model.
        buffers: its buffers.
        ranks: ranks whose parameters are averaged, in float64.
        workers: ranks whose buffers are combined.
        model: what this rank adds to the mean, (padded,), as the algorithm has it; None: its
            parameters.
        weight: weight of it in the mean.
        check_finite: whether to refuse models that are not finite.

    Raises:
        UserError: the ranks' buffers are no longer alike.
        Diverged: a model is not finite; all ranks keep their own.
    """
    require_agreement(
        comm,
        {"buffer": buffers.description()},
        "set training.buffers.rules = {name: 'keep'} on all ranks for a buffer of each rank's own, "
        "such as a cache that has grown, and average again",
    )
    own = parameters.to_host(parameters.vector if model is None else model)
    total = np.zeros(own.size + 1)  # the last element is the weight of all
    if comm.rank in ranks:  # zeros otherwise: 0 times what is not finite is no zero
        total[:-1] = own
        total[:-1] *= weight
        total[-1] = weight
    comm.sum(total)
    if check_finite and not np.isfinite(total).all():
        _refuse_nonfinite(comm, parameters, own, ranks)
    parameters.set(total[:-1] / total[-1])
    combine_buffers(comm, buffers, workers)


def _refuse_nonfinite(
    comm: SurvivingRanks, parameters: FlatParameters, own: np.ndarray, ranks: Collection[int]
) -> None:
    """Raise the same error on all ranks, as the sum of their models is not finite. Collective."""
    bad = np.flatnonzero(~np.isfinite(own)) if comm.rank in ranks else np.empty(0, int)
    found = comm.allgather((parameters.name_of(int(bad[0])), bad.size) if bad.size else None)
    where = [f"{entry[0]} of rank {rank}" for rank, entry in enumerate(found) if entry]
    raise Diverged(
        f"the mean of the models: parameter {', '.join(where[:4]) or 'sums'} "
        f"{'is' if len(where) < 2 else 'are'} not finite, and would make all models so; set that "
        "model anew on its rank, or end the run"
    )


def copy_model(comm: SurvivingRanks, parameters: FlatParameters, source: int) -> None:
    """Copy the parameters of rank `source` to all ranks. Collective."""
    model = parameters.to_host(parameters.vector)
    comm.broadcast(model, source)
    parameters.set(model)


def combine_buffers(comm: SurvivingRanks, buffers: ModelBuffers, workers: Collection[int]) -> None:
    """Replace the buffers of all ranks by those of `workers`, combined by their rules. Collective.

    Only buffers that differ between ranks are sent, a block at a time.

    Args:
        comm: the living ranks.
        buffers: buffers of this rank, which are alike on all ranks.
        workers: ranks whose buffers count.
    """
    tensors = buffers.shared()
    works = comm.rank in workers
    for name in _differing(comm, buffers):
        dtype, size = tensors[name].dtype, tensors[name].element_size()
        rule = buffers.rule(name, tensors[name])
        data = read_bytes(tensors[name])
        combined = np.empty_like(data)
        with_nan = set()
        block = max(1, _BLOCK // comm.size // size) * size
        for start in range(0, data.size, block):
            part = slice(start, start + block)
            gathered = enumerate(comm.allgather(data[part].tobytes() if works else None))
            found = {r: np.frombuffer(piece, np.uint8) for r, piece in gathered if piece}
            combined[part] = combine(rule, dtype, list(found.values()))
            with_nan |= {rank for rank, piece in found.items() if has_nan(dtype, piece)}
        if with_nan and with_nan != set(found) and comm.rank == min(found):
            _log.warning(
                "buffer %s has NaN on ranks %s, but not on all: rule %s went by the others",
                *(name, sorted(with_nan), rule),
            )
        write_bytes(tensors[name], combined)


def _differing(comm: MPI.Intracomm | SurvivingRanks, buffers: ModelBuffers) -> list[str]:
    """Return the names of the buffers that are not equal on all ranks. Collective."""
    gathered = comm.allgather(buffers.digests())
    own, *others = [digests for digests in gathered if digests is not None]
    return [name for name in own if any(other[name] != own[name] for other in others)]
