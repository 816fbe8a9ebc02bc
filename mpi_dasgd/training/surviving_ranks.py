"""Collective operations among the ranks that live, which MPI's own do not survive.

The lowest living rank leads: it collects what the others send, merges it, and gives the result to
all, first to the rank that would lead next. A rank that dies is not waited for. If it is the
leader, the next rank leads, and the others send again; a leader that has the result of an operation
already gives that. An operation ends on the leader when all have taken the result: its process may
end then, and what it has sent would be lost with it.
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
        self._early: list[tuple[int, _Sent]] = []  # parts of the next operation
        self._incomplete: list[MPI.Request] = []  # they hold memory that MPI may still use

    def allgather(self, own: Any) -> list[Any]:
        """Return what each rank has given, in order of ranks; None for a dead one.

        Raises:
            PeerLost: a living rank does not come.
        """
        return self._merge(own, lambda parts: [parts.get(rank) for rank in range(self.size)])

    def sum(self, array: np.ndarray) -> None:
        """Replace `array` by its sum over the living ranks, the same bits on all.

        Raises:
            PeerLost: a living rank does not come.
        """
        result = np.empty_like(array)
        if self._all_live() and self._completes(self._comm.Iallreduce(array, result)):
            array[:] = result
        else:
            array[:] = self._merge(array, lambda parts: sum(parts[r] for r in sorted(parts)))

    def broadcast(self, array: np.ndarray, source: int) -> None:
        """Replace `array` by that of rank `source`.

        Raises:
            PeerLost: `source` is dead, or a living rank does not come.
        """
        result = array if self.rank == source else np.empty_like(array)
        if not (self._all_live() and self._completes(self._comm.Ibcast(result, source))):
            own = array if self.rank == source else None
            result = self._merge(own, lambda parts: parts.get(source))
            if result is None:
                raise PeerLost(f"rank {source} is gone, whose model all ranks need")
        array[:] = result

    def attend(self) -> None:
        """Give the last result to ranks that miss it, as their leader has died.

        Call it where this rank waits for others outside of an operation.
        """
        self._deadline = time.monotonic() + self._timeout
        if (received := self._receive(None, _TO_LEADER)) is not None:
            source, sent = received
            if sent.operation > self._operation:
                self._early.append(received)
            else:
                self._send(source, _FROM_LEADER, self._last)

    def _all_live(self) -> bool:
        return all(self.allgather(not self._dead))  # None of a rank that has died meanwhile

    def _completes(self, request: MPI.Request) -> bool:
        """Return whether an operation of all ranks completes on all that live."""
        self._incomplete.append(request)
        others = [rank for rank in range(self.size) if rank != self.rank]
        return False not in self.allgather(self._await(request, others))

    def _merge(self, own: Any, merge: Callable[[dict[int, Any]], Any]) -> Any:
        """Return what the leader has merged of the parts of all living ranks."""
        self._operation += 1
        self._deadline = time.monotonic() + self._timeout
        self._incomplete = [request for request in self._incomplete if _test(request) is False]
        while True:
            leader = next(rank for rank in range(self.size) if rank not in self._dead)
            if leader == self.rank:
                result = self._lead(own, merge)
            else:
                self._send(leader, _TO_LEADER, _Sent(self._operation, own))
                found = self._result_of(leader)
                if found is None:
                    continue  # it has died
                result = found.content
            self._last = _Sent(self._operation, result)
            return result

    def _lead(self, own: Any, merge: Callable[[dict[int, Any]], Any]) -> Any:
        parts = {self.rank: own}
        while any(rank not in parts and rank not in self._dead for rank in range(self.size)):
            received = self._early.pop() if self._early else self._receive(None, _TO_LEADER)
            if received is None:
                self._pause(rank for rank in range(self.size) if rank not in parts)
                continue
            source, sent = received
            if sent.operation == self._operation:
                parts[source] = sent.content
            else:
                self._send(source, _FROM_LEADER, self._last)
        result = merge(parts)
        self._give(result, sorted(rank for rank in parts if rank != self.rank))
        return result

    def _give(self, result: Any, ranks: list[int]) -> None:
        """Send the result to `ranks`, and wait until they have taken it."""
        sent = _Sent(self._operation, result)
        while ranks:  # a rank has it that leads after this one, before any other has
            successor, *ranks = ranks
            if self._await(self._send(successor, _FROM_LEADER, sent), [successor]):
                break
        requests = [(rank, self._send(rank, _FROM_LEADER, sent)) for rank in ranks]
        for rank, request in requests:
            self._await(request, [rank])

    def _result_of(self, leader: int) -> _Sent | None:
        while True:
            is_dead = leader in self._dead  # before: what it has sent by then is taken
            received = self._receive(leader, _FROM_LEADER)
            if received is not None and received[1].operation == self._operation:
                return received[1]
            if received is None:
                if is_dead:
                    return None
                self._pause([leader])

    def _await(self, request: MPI.Request, ranks: Collection[int]) -> bool:
        """Return whether a request that needs `ranks` completes; not if one of them is dead."""
        self._deadline = time.monotonic() + self._timeout
        while (is_complete := _test(request)) is False:
            if any(rank in self._dead for rank in ranks):
                break
            self._pause(ranks)
        return bool(is_complete)

    def _pause(self, awaited: Iterable[int]) -> None:
        """Wait for a moment, and look who lives.

        Raises:
            PeerLost: the operation has lasted too long.
        """
        time.sleep(_POLL_SECONDS)
        self._refresh()
        if time.monotonic() > self._deadline:
            ranks = [rank for rank in awaited if rank not in self._dead]
            raise PeerLost(
                f"rank {self.rank} has waited in a collective call (average, mean_model) for ranks "
                f"{ranks} for {self._timeout:g} s; every rank must make the same calls"
            )

    def _send(self, rank: int, tag: int, sent: _Sent) -> MPI.Request:
        """Return a request that is complete when `rank` has taken the message."""
        request = self._comm.issend(tuple(sent), rank, tag)
        self._incomplete.append(request)
        return request

    def _receive(self, source: int | None, tag: int) -> tuple[int, _Sent] | None:
        """Return the sender of a message and what it has sent; None if there is none yet."""
        from mpi4py import MPI  # not before: it starts MPI

        status = MPI.Status()
        message = self._comm.improbe(MPI.ANY_SOURCE if source is None else source, tag, status)
        if message is None:
            return None
        sender, request = status.Get_source(), message.irecv()
        while True:
            is_dead = sender in self._dead
            try:
                is_there, content = request.test()
            except MPI.Exception:  # it has died, as will be seen
                return None
            if is_there:
                operation, part = cast("tuple[int, Any]", content)
                return sender, _Sent(operation, part)
            if is_dead:
                self._incomplete.append(request)
                return None
            self._pause([sender])


def _test(request: MPI.Request) -> bool | None:
    """Return whether a request is complete; None if it has failed, as those to dead ranks may."""
    from mpi4py import MPI  # not before: it starts MPI

    try:
        return request.Test()
    except MPI.Exception:
        return None
