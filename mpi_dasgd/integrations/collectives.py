"""What frameworks do with all ranks outside of the steps: gather metrics, broadcast, wait."""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mpi_dasgd import launch
from mpi_dasgd.errors import PeerLost, UserError
from mpi_dasgd.training.rank_parts import start_world
from mpi_dasgd.transport.membership import FAILED

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint
    from mpi_dasgd.world import World

__all__ = ["Collectives", "collectives"]

_POLL_SECONDS = 1e-4
_PEER_CHECK_SECONDS = 0.005
_NOTICE = 1  # tag of messages without content
_NOTHING = np.empty(0, np.uint8)


class Collectives:
    """Collective calls on objects and tensors, which yield the core while they wait.

    All calls are collective. While training runs, a rank that dies ends them instead of blocking
    them for ever.

    Args:
        world: the ranks of the job.

    Attributes:
        world: the ranks of the job.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._comm = world.comm.Dup()  # own calls of the package are never mixed up with these
        self._endpoint: RmaEndpoint | None = None
        self._lost: int | None = None  # a rank that is gone: no call can succeed any more
        self._notices: list[MPI.Request] = []

    def watch(self, endpoint: RmaEndpoint | None) -> None:
        """Let the ranks of `endpoint` be watched in all calls from now on; None: no longer."""
        self._endpoint = endpoint

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._wait(self._comm.Ibarrier())

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable `value` of each rank, in the order of the ranks."""
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.world.size, np.int64)
        self._wait(self._comm.Iallgather(np.array([mine.size], np.int64), sizes))
        received = np.empty(sizes.sum(), np.uint8)
        self._wait(self._comm.Iallgatherv(mine, [received, sizes]))
        parts = np.split(received, np.cumsum(sizes)[:-1])
        return [pickle.loads(part.tobytes()) for part in parts]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the picklable `value` of rank `source`."""
        mine = pickle.dumps(value) if self.world.rank == source else b""
        size = np.array([len(mine)], np.int64)
        self._wait(self._comm.Ibcast(size, root=source))
        data = np.empty(size[0], np.uint8)
        data[: len(mine)] = np.frombuffer(mine, np.uint8)
        self._wait(self._comm.Ibcast(data, root=source))
        return pickle.loads(data.tobytes())

    def begin_vote(self, value: int) -> Callable[[], list[int]]:
        """Give a number, and return a function that waits for those of all ranks."""
        votes = np.empty(self.world.size, np.int64)
        request = self._comm.Iallgather(np.array([value], np.int64), votes)

        def answers() -> list[int]:
            self._wait(request)
            return [int(vote) for vote in votes]

        return answers

    def notify(self) -> None:
        """Let `is_notified` be true on all other ranks. Not collective."""
        others = (rank for rank in range(self.world.size) if rank != self.world.rank)
        self._notices = [self._comm.Isend(_NOTHING, rank, _NOTICE) for rank in others]

    def is_notified(self) -> bool:
        """Return whether another rank has called `notify`. Not collective."""
        return self.world.size > 1 and self._comm.Iprobe(tag=_NOTICE)

    def take_notices(self, ranks: Collection[int]) -> None:
        """Forget the calls of `notify` of these ranks, which have called it. Collective."""
        for rank in ranks:
            if rank != self.world.rank:
                self._wait(self._comm.Irecv(_NOTHING, rank, _NOTICE))
        while self._notices:
            self._wait(self._notices.pop())

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the `tensor` of each rank, on the device of this rank's.

        Raises:
            UserError: shapes or types differ.
        """
        kinds = self.gather((tuple(tensor.shape), tensor.dtype))
        if len(set(kinds)) > 1:
            raise UserError(
                f"gather: the ranks must give tensors of one shape and type, but they are {kinds}; "
                "pad them first (accelerator.pad_across_processes)"
            )
        mine = tensor.detach().cpu().contiguous()
        # Bytes: MPI does not know all types of torch.
        flat = mine.reshape(-1).view(torch.uint8).numpy() if mine.numel() else np.empty(0, np.uint8)
        received = torch.empty((self.world.size, flat.size), dtype=torch.uint8)
        self._wait(self._comm.Iallgather(flat, received.numpy()))
        return [
            part.view(tensor.dtype).reshape(tensor.shape).to(tensor.device) for part in received
        ]

    def reduce_tensor(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        """Return the `mean`, `sum` or `max` over the ranks of `tensor`, in its type."""
        parts = torch.stack(self.gather_tensor(tensor))
        if operation == "max":
            return parts.amax(0)
        if operation == "sum":
            return parts.sum(0, dtype=tensor.dtype)
        if operation == "mean":
            mean = parts.mean(0, dtype=None if parts.is_complex() else torch.float64)
            return mean.to(tensor.dtype if tensor.is_floating_point() else torch.float32)
        raise UserError(f"reduction: expected mean, sum or max, got {operation!r}")

    def _wait(self, request: MPI.Request) -> None:
        checked = time.monotonic()
        while not request.Test():
            if self._lost is not None:
                raise PeerLost(f"rank {self._lost} is gone, and this needs all ranks")
            time.sleep(_POLL_SECONDS)
            if self._endpoint is not None and time.monotonic() - checked > _PEER_CHECK_SECONDS:
                checked = time.monotonic()
                self._endpoint.refresh_membership()
                membership = self._endpoint.membership
                failed = [r for r, status in enumerate(membership.status) if status == FAILED]
                self._lost = next(iter([*failed, *sorted(membership.dead)]), None)


@functools.cache
def collectives() -> Collectives:
    """Start MPI, once in a process, and return the calls on its ranks. Collective."""
    launch.setting_up()
    with launch.constructing():
        return Collectives(start_world())
