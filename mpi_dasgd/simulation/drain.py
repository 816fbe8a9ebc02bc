"""End of a simulation, as a real run ends: claims are released, messages in flight absorbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpi_dasgd.transport.endpoint import Request

if TYPE_CHECKING:
    from mpi_dasgd.simulation.simulator import Simulator

__all__ = ["drain"]


def drain(run: Simulator) -> None:
    """Finalize all ranks of `run` and absorb messages until none moves any more."""
    finalized: set[int] = set()
    # A rank that waits in the middle of a step may go on when others absorb.
    moved = -1
    while moved != (moved := _messages_moved(run)):
        for rank in set(range(run.size)) - run.waiting_since.keys() - finalized:
            finalized.add(rank)
            _finalize(run, run.algorithms[rank].finalize())
        while run.clock.advance():
            pass
        for rank in finalized:
            run.algorithms[rank].absorb(run.locals[rank].local_step)


def _messages_moved(run: Simulator) -> int:
    """Return the messages sent and absorbed so far, plus the ranks with messages in flight."""
    counters = [endpoint.counters for endpoint in run.endpoints]
    in_flight = sum(not endpoint.is_flushed() for endpoint in run.endpoints)
    return sum(c.messages + c.absorbed for c in counters) + in_flight


def _finalize(run: Simulator, steps: Iterator[Request]) -> None:
    for request in steps:
        run.network.notify(request, lambda: _finalize(run, steps))
        return
