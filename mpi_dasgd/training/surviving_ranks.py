"""Collective operations among the ranks that live, which MPI's own do not survive.

The lowest living rank leads: it collects what the others send, merges it, and sends the result to
all. A rank that dies is not waited for. If it is the leader, the next rank leads, and the others
send again; a leader that has the result of an operation already sends that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from mpi_dasgd.errors import PeerLost

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["SurvivingRanks"]

_POLL_SECONDS = 2e-4
_TO_LEADER, _FROM_LEADER = 771, 772  # tags of messages


class _Sent(NamedTuple):
    """What is sent: the number of an operation, and this rank's part of it, or its result."""

    operation: int
    content: Any


class SurvivingRanks:
    """The living ranks of a communicator: what `synchronize` needs of them.

    All living ranks call the same operations in the same order.

    Args:
        comm: communicator of all ranks.
        dead: ranks that have died, as far as is known; it grows while `refresh` is called.
        refresh: looks which ranks live.
        timeout: seconds after which an operation ends to which a living rank does not come.

    Attributes:
        rank, size: those of `comm`; dead ranks keep their numbers.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        dead: Collection[int],
        refresh: Callable[[], object],
        timeout: float = 300.0,
    ) -> None:
        self.rank, self.size = comm.rank, comm.size
        self._comm = comm
        self._dead = dead
        self._refresh = refresh
        self._timeout = timeout
        self._deadline = 0.0  # of the operation
        self._operation = 0
        self._last = _Sent(0, None)  # result of the operation before
        self._unsent: list[MPI.Request] = []

    def allgather(self, own: Any) -> list[Any]:
        """Return what each rank has given, in order of ranks; None for a dead one.

        Raises:
            PeerLost: a living rank does not come.
        """
        return self._merge(own, lambda parts: [parts.get(rank) for rank in range(self.size)])

    def sum(self, array: np.ndarray) -> None:
        """Replace `array` by its sum over the living ranks, the same bits on all.

        Raises:
            PeerLost: a rank has died in the midst of the sum, or a living one does not come.
        """
        from mpi4py import MPI  # not before: it starts MPI

        if any(self.allgather(bool(self._dead))):
            array[:] = self._merge(array, lambda parts: sum(parts[rank] for rank in sorted(parts)))
            return
        self._wait(self._comm.Iallreduce(MPI.IN_PLACE, array), "a sum over all ranks")

    def broadcast(self, array: np.ndarray, source: int) -> None:
        """Replace `array` by that of rank `source`.

        Raises:
            PeerLost: `source` is dead, a rank has died in the midst of it, or a living one does not
                come.
        """
        if any(self.allgather(bool(self._dead))):
            own = array if self.rank == source else None
            found = self._merge(own, lambda parts: parts.get(source))
            if found is None:
                raise PeerLost(f"rank {source} is gone, whose model all ranks need")
            array[:] = found
            return
        self._wait(self._comm.Ibcast(array, source), "a broadcast to all ranks")

    def _wait(self, request: MPI.Request, operation: str) -> None:
        """Wait for an operation of MPI to which all ranks have come."""
        while not request.Test():
            time.sleep(_POLL_SECONDS)
            self._refresh()
            if self._dead:
                raise PeerLost(f"rank {min(self._dead)} is gone, inside {operation}")
            if time.monotonic() > self._deadline:
                raise PeerLost(
                    f"rank {self.rank} has waited inside {operation} for {self._timeout:g} s: "
                    "another one is gone, or stands still"
                )

    def _merge(self, own: Any, merge: Callable[[dict[int, Any]], Any]) -> Any:
        """Return what the leader has merged of the parts of all living ranks."""
        self._operation += 1
        self._deadline = time.monotonic() + self._timeout
        self._unsent = [request for request in self._unsent if not request.Test()]
        while True:
            leader = next(rank for rank in range(self.size) if rank not in self._dead)
            if leader == self.rank:
                result = self._lead(own, merge)
            else:
                self._send(leader, _TO_LEADER, own)
                found = self._result_of(leader)
                if found is None:
                    continue  # it has died
                result = found.content
            self._last = _Sent(self._operation, result)
            return result

    def _lead(self, own: Any, merge: Callable[[dict[int, Any]], Any]) -> Any:
        parts = {self.rank: own}
        while any(rank not in parts and rank not in self._dead for rank in range(self.size)):
            received = self._receive(None, _TO_LEADER)
            if received is None:
                self._check_time(rank for rank in range(self.size) if rank not in parts)
                continue
            source, sent = received
            if sent.operation == self._operation:
                parts[source] = sent.content
            else:
                self._send(source, _FROM_LEADER, None, self._last)
        result = merge(parts)
        for rank in parts:
            if rank != self.rank:
                self._send(rank, _FROM_LEADER, result)
        return result

    def _result_of(self, leader: int) -> _Sent | None:
        while leader not in self._dead:
            received = self._receive(leader, _FROM_LEADER)
            if received is not None and received[1].operation == self._operation:
                return received[1]
            self._check_time([leader])
        return None

    def _check_time(self, missing: Iterable[int]) -> None:
        """Raise if the operation has lasted too long, waiting for the ranks `missing`."""
        if time.monotonic() > self._deadline:
            ranks = [rank for rank in missing if rank not in self._dead]
            raise PeerLost(
                f"rank {self.rank} has waited in a collective call (average, mean_model) for ranks "
                f"{ranks} for {self._timeout:g} s; every rank must make the same calls"
            )

    def _send(self, rank: int, tag: int, content: Any, sent: _Sent | None = None) -> None:
        message = tuple(sent or _Sent(self._operation, content))
        self._unsent.append(self._comm.isend(message, rank, tag))

    def _receive(self, source: int | None, tag: int) -> tuple[int, _Sent] | None:
        """Return the sender of a message and what it has sent; None if there is none yet."""
        from mpi4py import MPI  # not before: it starts MPI

        status = MPI.Status()
        message = self._comm.improbe(MPI.ANY_SOURCE if source is None else source, tag, status)
        if message is None:
            time.sleep(_POLL_SECONDS)
            self._refresh()
            return None
        request = message.irecv()
        while True:
            is_there, content = request.test()
            if is_there:
                operation, part = cast("tuple[int, Any]", content)
                return status.Get_source(), _Sent(operation, part)
            time.sleep(_POLL_SECONDS)
            self._refresh()
            if status.Get_source() in self._dead:
                return None
