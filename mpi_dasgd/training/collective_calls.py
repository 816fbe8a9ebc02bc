"""Collective calls in mid-run: ranks wait for each other by control words, and never blindly.

The word of a rank is ``count << 8 | phase << 4 | call``: the calls that it has completed, how far
it is in the present one, and which that is. All ranks make the same calls in the same order, so
that the words of all say who waits for whom, and who will never come.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpi_dasgd.errors import UserError
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.membership import DEPARTED, RUNNING

if TYPE_CHECKING:
    from mpi_dasgd.training.waiter import Waiter
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["Call", "CollectiveCalls", "Phase", "refuse_mismatch"]

_log = logging.getLogger("mpi_dasgd")

_WARN_SECONDS = 10.0  # of waiting, after which the user is told for whom


class Call(enum.IntEnum):
    """Which collective call a rank is in."""

    NONE = 0
    AVERAGE = 1
    PAUSED = 2
    MEAN_MODEL = 3

    def __str__(self) -> str:
        return f"{self.name.lower()}()"


_AFTER_END = 8  # added to a call that is made when training has ended, on all ranks


class Phase(enum.IntEnum):
    """How far a rank is in its collective call; some calls leave phases out."""

    OUTSIDE = 0
    ENTERED = 1
    """It begins no further step of its own."""
    STOPPED = 2
    """It holds nothing of other ranks, and all that it has sent has arrived."""
    QUIET = 3
    """It has absorbed and answered all that it must."""
    LEFT = 4
    """It has left the ``with`` block."""


class CollectiveCalls:
    """The collective calls of one rank, in order.

    Args:
        endpoint: transport of this rank.
        waiter: waits for the other ranks.
    """

    def __init__(self, endpoint: RmaEndpoint, waiter: Waiter) -> None:
        self._endpoint = endpoint
        self._membership = endpoint.membership
        self._waiter = waiter
        self._completed = 0
        self._word_of_call = 0

    def enter(self, call: Call) -> None:
        """Publish that this rank has come to `call`, and begins no further step of its own."""
        training = self._membership.status[self._endpoint.rank] == RUNNING
        self._word_of_call = call if training else call + _AFTER_END
        self._publish(Phase.ENTERED)

    def join(self, call: Call) -> None:
        """Enter `call`, which others make, at the end of this rank's own training."""
        self._word_of_call = call
        self._publish(Phase.ENTERED)

    def have_reached(self, phase: Phase) -> bool:
        """Return whether all living ranks have reached `phase`, as this one knows."""
        return not self._missing(phase)

    def reach(self, phase: Phase, meanwhile: Callable[[], object]) -> None:
        """Publish that this rank has reached `phase`, and wait until all living ones have.

        Args:
            phase: how far it is.
            meanwhile: called again and again while it waits.

        Raises:
            UserError: another rank makes another call, or never comes to this one.
            PeerLost: a rank has failed, or none makes progress.
        """
        self._publish(phase)
        call = _name(self._word_of_call)
        started, is_told = time.monotonic(), False

        def is_reached() -> bool:
            nonlocal is_told
            self._endpoint.refresh_progress()
            missing = self._missing(phase)
            if not missing:
                return True
            meanwhile()
            if not is_told and time.monotonic() - started > _WARN_SECONDS:
                is_told = True
                _log.warning(
                    "rank %d waits in %s for rank %d, which %s",
                    *(self._endpoint.rank, call, missing[0], self._place(missing[0])),
                )
            return False

        self._waiter.poll_until(is_reached)

    def leave(self, meanwhile: Callable[[], object] | None) -> None:
        """Leave the present call.

        Args:
            meanwhile: see `reach`; the call ends when all ranks have left it. None: now.

        Raises:
            UserError, PeerLost: see `reach`.
        """
        self._completed += 1
        if meanwhile is None:
            self._publish(Phase.OUTSIDE)
        else:
            self.reach(Phase.OUTSIDE, meanwhile)
        self._word_of_call = 0
        self._publish(Phase.OUTSIDE)

    def pending(self) -> Call:
        """Return the call in which ranks that still train wait for this one; NONE if in none."""
        for rank, word in enumerate(self._membership.calls):
            is_present = word >> 8 == self._completed and word & 0xF0
            if is_present and not word & _AFTER_END and rank not in self._membership.dead:
                return Call(word & 0xF)
        return Call.NONE

    def _publish(self, phase: Phase) -> None:
        release = self._endpoint.release
        if release.is_pending:  # others go on when they see the word, and claim what is there then
            self._waiter.poll_until(lambda: not release.is_pending)
        call = self._word_of_call if phase else 0
        self._membership.publish_call(self._completed << 8 | phase << 4 | call)

    def _missing(self, phase: Phase) -> list[int]:
        level = self._completed << 4 | phase
        return [
            rank
            for rank, word in enumerate(self._membership.calls)
            if word >> 4 < level and rank not in self._membership.dead
        ]

    def _place(self, rank: int) -> str:
        """Return a predicate that says what `rank` does."""
        word = self._membership.calls[rank]
        if word & 0xF0:
            return f"is in {_name(word)}"
        return self._membership.activities[rank].describe(self._endpoint.gradients_of(rank))


def _name(word: int) -> Call:
    """Return the call of a control word."""
    return Call(word & 0xF & ~_AFTER_END)


def refuse_mismatch(endpoint: RmaEndpoint) -> None:
    """Refuse to wait for a rank that will never come to the collective call that another is in.

    Every rank finds the same in the words of all, whether it is in a call itself or not.

    Raises:
        UserError: says which ranks do what.
    """
    membership = endpoint.membership
    if not any(membership.calls) or not any(word & 0xF0 for word in membership.calls):
        return
    count = min(word >> 8 for word in membership.calls if word & 0xF0)
    here = [
        rank
        for rank, word in enumerate(membership.calls)
        if word >> 8 <= count and rank not in membership.dead
    ]
    first = next((rank for rank in here if membership.calls[rank] & 0xF0), None)
    if first is None:
        return
    call = _name(membership.calls[first])
    same = "every rank must make the same collective calls, in the same order"
    for rank in here:
        word, activity = membership.calls[rank], membership.activities[rank].activity
        if word & 0xF0 and _name(word) != call:
            raise UserError(
                f"{call}: it is collective, but rank {first} is in {call} and rank {rank} in "
                f"{_name(word)}; {same}"
            )
        if not word & 0xF0 and (
            activity is Activity.CLOSING or membership.status[rank] == DEPARTED
        ):
            raise UserError(
                f"{call}: it is collective, but rank {first} is in {call} and rank {rank} in "
                f"close(); {same}"
            )
