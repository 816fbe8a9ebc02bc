"""Shadowing: a rank that has made its last step takes part in the others', without gradients.

Ranks of an algorithm in lockstep wait for each other in every exchange, so that one that has fewer
batches, or leaves its loop, would be missed for ever. As with PyTorch's Join it becomes a *shadow*:
it runs the same step of the algorithm with a gradient of zero and an optimizer that does nothing.
So `allreduce` divides by the initial number of ranks, and averages of models go on over all ranks.
With `allreduce` the shadow applies the mean of the others, so that all ranks keep one model; at the
end it gets that of a rank that stayed longest, since a schedule may have gone on without it.

The protocol has one rule: **a shadow begins step s once some rank has begun step s with a gradient
of its own**, which the word GRADIENTS says; it ends when all ranks have left and it has made the
newest step that any has begun. No code of a rank that still trains knows of it.

Why no rank waits for ever, if ranks go on to compute or leave:

* Let E be the newest step that any rank ever begins with a gradient. Every rank makes the steps 1
  to E, each of them once and in this order: its own first, the others as a shadow. For it sees each
  of them begun: a word GRADIENTS never falls, and says s before the exchange of s begins.
* So in each step all ranks take part, as the algorithm expects, and whatever it guarantees holds:
  that a step ends if all ranks come (`dpsgd`, `sgp` and `osgp` have the argument), on sparse graphs
  too, where ranks are several steps apart, and with local steps, where most steps exchange nothing.
* No rank begins a step E + 1, which others would not make: a shadow only follows. All ranks end
  after the same step E, whoever leaves first, before its first step or last; if all leave after the
  same step there is none to shadow. E is known when all have left: a rank reports that it has left
  after its last GRADIENTS, and is read in the opposite order.
* A rank that dies ends the run of the others (`Algorithm.required_ranks`). One that neither steps
  nor leaves ends their wait after `transport.stall_timeout`, with its number (`stall.py`).

With a budget in seconds rank 0 declares the last step, and goes on to do so as a shadow: it takes
part in step s before any rank can begin the step that it names.

A process may train two models (GANs): while it waits at the end of one, its ranks take part in the
steps of the other in the same way, or answer as a server, since others may not come to the end of
the first before. These steps count: own ones go on behind them. (What only one rank can do is not
done: to compute the gradient of a work item of `minibatch`, or of `asgd` with few items. That wait
is bounded like all others.) With `allreduce` such a rank's learning rate is that of its own last
step: a schedule that has gone on elsewhere is to be caught up with, before it goes on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar, Protocol

from mpi_dasgd.algorithms import Algorithm, LocalOptimizer
from mpi_dasgd.training.shadow_optimizer import FollowingOptimizer, IdleOptimizer
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.endpoint import Request

if TYPE_CHECKING:
    from mpi_dasgd.training.budget import Budget
    from mpi_dasgd.training.rank_parts import RankParts
    from mpi_dasgd.transport.rma.endpoint import RmaEndpoint  # its import starts MPI

__all__ = ["EndpointPeers", "Peers", "Shadow", "make_shadow"]


class Peers(Protocol):
    """What a shadow must know of all ranks, itself included."""

    def refresh(self) -> None:
        """Read what the ranks have reported."""

    def have_reached(self, activity: Activity) -> bool:
        """Return whether all ranks are at `activity` or beyond."""

    def report(self, activity: Activity) -> None:
        """Tell the other ranks what this one does."""

    def newest_step(self) -> int:
        """Return the newest step that any rank has begun with a gradient.

        It is final for the moment if it is read after `have_reached` has returned true.
        """


class EndpointPeers:
    """All ranks, as the transport of this one knows them: `Peers`."""

    def __init__(self, endpoint: RmaEndpoint) -> None:
        self._endpoint = endpoint
        self._membership = endpoint.membership

    def refresh(self) -> None:
        self._endpoint.refresh_progress()

    def have_reached(self, activity: Activity) -> bool:
        return all(reported.activity >= activity for reported in self._membership.activities)

    def report(self, activity: Activity) -> None:
        self._membership.report_activity(activity)

    def newest_step(self) -> int:
        return max(self._membership.gradients)


class Shadow:
    """Takes part in the steps that other ranks have begun, without ever waiting in a call.

    Args:
        algorithm: algorithm of this rank; nothing else makes steps of it meanwhile.
        local: local optimizer of this rank, whose `local_step` counts the steps of the shadow, too.
        peers: all ranks.
        on_begin: called with the number of each step before the shadow takes part in it.
        on_end: called after each step.
        stand_in: local optimizer of the shadow, which follows the others' updates; None: an
            `IdleOptimizer`.

    Attributes:
        in_lockstep: whether the algorithm is in lockstep.
        open_step: the step that has begun and is not complete; None if there is none.
    """

    _open: ClassVar[weakref.WeakSet[Shadow]] = (
        weakref.WeakSet()
    )  # of all models that this process trains

    def __init__(
        self,
        algorithm: Algorithm,
        local: LocalOptimizer,
        peers: Peers,
        on_begin: Callable[[int], None] = lambda step: None,
        on_end: Callable[[], None] = lambda: None,
        stand_in: LocalOptimizer | None = None,
    ) -> None:
        self.in_lockstep = algorithm.is_lockstep(algorithm.settings)
        self._algorithm = algorithm
        self._local = local
        self._follows = stand_in is not None
        self._stand_in = stand_in or IdleOptimizer(algorithm.x)
        self._peers = peers
        self._on_begin, self._on_end = on_begin, on_end
        self.open_step: Iterator[Request] | None = None
        self._request: Request | None = None  # what it waits for
        self._open.add(self)

    def poll(self, until: Activity | Callable[[], bool]) -> bool:
        """Go on with the steps that others have begun, as far as possible now.

        Args:
            until: what a rank does that begins no further steps, or a function that tells whether
                no rank does, from what `Peers.refresh` has read.

        Returns:
            Whether no rank begins further steps, and this one has made all that were begun.
        """
        self._peers.refresh()
        while self.advance():
            # before the newest step
            is_final = until() if callable(until) else self._peers.have_reached(until)
            if self._local.local_step >= self._peers.newest_step():
                return is_final
            step = self._local.local_step + 1
            self._local.local_step = self._stand_in.local_step = step
            self._on_begin(step)
            self.open_step = self._algorithm.step(self._stand_in)
        return False

    def advance(self) -> bool:
        """Go on with the step that has begun; return whether it is complete, or none has."""
        while self.open_step is not None:
            if self._request is not None and not self._request.test():
                return False
            self._request = next(self.open_step, None)
            if self._request is None:
                self.open_step = None
                self._on_end()
        return True

    def undo_step(self) -> None:
        """Count the last step as not made: an exception ended it, before its exchange.

        Others may have begun it, so that this rank makes it again, with a gradient or as a shadow.
        """
        if self.in_lockstep:
            self._local.local_step -= 1

    @contextlib.contextmanager
    def attention_to_others(self, wait: Callable[[Callable[[], bool]], None]) -> Iterator[None]:
        """Tell the ranks that train other models with this process that it waits in the body.

        Args:
            wait: waits until a function returns True.
        """
        others = [other for other in self._open if other is not self]
        for other in others:
            other._peers.report(Activity.ELSEWHERE)
        try:
            yield
            # The program may change gradients and model from now on. This ends at once: a step in
            # which all ranks have one model is complete on the others, or they would not be here.
            for other in others:
                if other._follows:
                    wait(other.advance)
        finally:
            for other in self._open.intersection(others):
                other._peers.report(Activity.OWN_CODE)

    def attend_others(self) -> None:
        """Do what other ranks wait for in the training of other models by this process."""
        for other in tuple(self._open):
            if other is not self:
                other.attend()

    def attend(self) -> None:
        """Do what other ranks wait for, while this rank's program waits elsewhere."""
        if self.in_lockstep:
            self.poll(Activity.SHADOWING)
        elif type(self._algorithm).attend is not Algorithm.attend:
            self._on_begin(self._local.local_step)
            self._algorithm.attend(self._local.local_step)
            self._on_end()

    def close(self) -> None:
        """End it: this process trains its model no more."""
        self._open.discard(self)


def make_shadow(parts: RankParts, budget: Budget) -> Shadow:
    """Make the shadow of a rank over MPI, which declares the last step for others as the rank."""
    parameters = parts.parameters

    def on_begin(step: int) -> None:
        parameters.gather()
        budget.declare_last_step(step)

    def on_end() -> None:
        parts.endpoint.flush()
        parameters.scatter()

    follows = parts.algorithm.capabilities.one_model and not parts.local.needs_closure
    return Shadow(
        parts.algorithm,
        parts.local,
        EndpointPeers(parts.endpoint),
        on_begin,
        on_end,
        FollowingOptimizer(parts.local, parameters) if follows else None,
    )
