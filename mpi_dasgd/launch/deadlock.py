"""Deadlocks of a job: ranks that wait in MPI for one that will never come.

What each rank does is known from its stage and its exit status, so that no time limit is needed:

* ranks in set-up, or that construct a `Decentralized`, wait for all others;
* a rank that has done all but finalize MPI waits there for all others, and comes to nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "CLOSED",
    "CONSTRUCTING",
    "LEAVING",
    "READY",
    "SET_UP",
    "Deadlock",
    "Kind",
    "find_deadlock",
]

SET_UP, CONSTRUCTING, READY, CLOSED, LEAVING = (
    "set-up", "constructing", "ready", "closed", "leaving"
)  # fmt: skip
"""Stages of a rank: needs all others; constructs a `Decentralized`, as all must; needs nobody;
has closed all trainings; has done all but finalize MPI."""

Kind: TypeAlias = Literal["loss", "absence", "end"]


@dataclass(frozen=True)
class Deadlock:
    """Ranks that wait for others in vain.

    Attributes:
        kind: "loss": in set-up, for a rank that was killed; "absence": to construct a
            `Decentralized`, for a rank that has done without and has ended; "end": to finalize MPI,
            for a rank that has ended without.
        missing: the ranks that they wait for, in order of their ends.
        waiting: the ranks that wait.
    """

    kind: Kind
    missing: tuple[int, ...]
    waiting: tuple[int, ...]


def find_deadlock(n: int, codes: Mapping[int, int], stages: Mapping[int, str]) -> Deadlock | None:
    """Return the deadlock in which ranks are, if they stay as they are; None: they are in none.

    Args:
        n: number of ranks.
        codes: exit status of each rank that has ended, in order of their ends.
        stages: stage of each rank that has declared one; "" while it is being written.
    """
    running = [rank for rank in range(n) if rank not in codes]
    in_set_up = [rank for rank in running if stages.get(rank) in (SET_UP, CONSTRUCTING, "")]
    constructing = [rank for rank in running if stages.get(rank) == CONSTRUCTING]
    leaving = [rank for rank in running if stages.get(rank) == LEAVING]
    killed = [rank for rank in codes if codes[rank] > 128]
    if in_set_up and killed:
        return Deadlock("loss", tuple(killed), tuple(in_set_up))
    if constructing and (codes or leaving):
        return Deadlock("absence", (*codes, *leaving), tuple(constructing))
    unfinalized = [r for r in codes if codes[r] > 128 or stages.get(r) != LEAVING]
    if leaving and len(leaving) == len(running) and unfinalized:
        return Deadlock("end", tuple(unfinalized), tuple(leaving))
    return None
