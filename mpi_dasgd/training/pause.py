"""Pauses: all ranks between two steps, nothing in flight, and then on with training.

1. enter:  begin no further step; in lockstep, take part in those that others have begun, so that
           all ranks have made the same number (`join.py`)
2. stop:   release what is held of other ranks (`Algorithm.suspend`), and wait until all that was
           sent has arrived; absorb, until all ranks have stopped: those that still step may wait
           for this one's answers
3. quiet:  absorb, until nothing is left that must be absorbed or answered, on any rank
4. body:   average, or let the user read and write
5. go on:  `Algorithm.reset` if all ranks have the same model now, else `Algorithm.resume`; no rank
           makes a step before all have done so

Ranks tell each other by control words how far they are (`collective_calls.py`). One that has left
training, and waits in `finish` for those that have not, takes part.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mpi_dasgd.errors import Diverged, MpiDasgdError, UserError
from mpi_dasgd.training import synchronize
from mpi_dasgd.training.collective_calls import Call, CollectiveCalls, Phase
from mpi_dasgd.training.join import Shadow
from mpi_dasgd.training.learning_rate import LearningRate
from mpi_dasgd.training.rank_parts import RankParts
from mpi_dasgd.training.shutdown import follow
from mpi_dasgd.training.surviving_ranks import SurvivingRanks
from mpi_dasgd.training.waiter import Waiter
from mpi_dasgd.transport.activity import Activity
from mpi_dasgd.transport.membership import DEPARTED, FAILED, FINISHED, RUNNING

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Pauses"]

_log = logging.getLogger("mpi_dasgd")


class Pauses:
    """The pauses of one rank's training.

    Args:
        comm: communicator of all ranks.
        parts: parts of this rank.
        learning_rate: counts what other ranks do while this one computes a gradient.
        waiter: waits for the other ranks.
        shadow: takes part in the steps of others.

    Attributes:
        open_call: the call in whose ``with`` block this rank is; `Call.NONE` outside of any.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        parts: RankParts,
        learning_rate: LearningRate,
        waiter: Waiter,
        shadow: Shadow,
    ) -> None:
        self.open_call = Call.NONE
        self._endpoint = parts.endpoint
        self._membership = parts.endpoint.membership
        self._algorithm = parts.algorithm
        self._parameters, self._buffers = parts.parameters, parts.buffers
        self._device = parts.parameters.device
        self._local = parts.local
        self._check_finite = parts.run.config.run.check_finite
        self._learning_rate = learning_rate
        self._waiter = waiter
        self._shadow = shadow
        self._calls = CollectiveCalls(parts.endpoint, waiter)
        self._is_leaving = False  # it has ended training, and joins the calls of others
        self._has_told = False
        self._survivors = SurvivingRanks(
            comm, self._membership.dead, self._look, parts.run.config.transport.stall_timeout
        )

    def average(self) -> None:
        """Set all models to the mean of those that the run trains; see `Decentralized.average`."""
        self.refuse_inside("average()")
        self._parameters.check()
        exchanges = self._exchanges
        with self._device.current_stream():
            if exchanges:
                self._quiesce(Call.AVERAGE)
            else:
                self._meet(Call.AVERAGE)
            self._average()
            if exchanges:
                self._algorithm.reset(self._local.local_step)
                self._parameters.scatter()
            self._leave()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let the user write to the models; see `Decentralized.paused`."""
        self.refuse_inside("paused()")
        exchanges = self._exchanges
        with self._device.current_stream():
            if exchanges:
                self._quiesce(Call.PAUSED)
            else:
                self._meet(Call.PAUSED)

        def go_on() -> None:
            if exchanges:
                self._resume()
            self._leave()

        with self._body(Call.PAUSED, go_on):
            yield

    @contextlib.contextmanager
    def mean_model(self) -> Iterator[None]:
        """Let the user read the mean of all models; see `Decentralized.mean_model`."""
        self.refuse_inside("mean_model()")
        # Ranks that never wait for this one are left alone, with all that is in flight.
        never_waits = self._is_lockstep or self._algorithm.description.never_waits
        stops = self._exchanges and not never_waits
        with self._device.current_stream():
            if stops:
                self._quiesce(Call.MEAN_MODEL)
            else:
                self._meet(Call.MEAN_MODEL)
            own = self._parameters.to_host(self._parameters.vector).copy()
            buffers = self._buffers.pack()
            self._average()
            if not stops:
                self._leave(wait=False)

        def go_on() -> None:
            self._parameters.set(own)
            self._buffers.unpack(buffers)
            if stops:
                self._resume()
                self._leave()

        with self._body(Call.MEAN_MODEL, go_on):
            yield

    def take_part(self) -> None:
        """Take part in the call that others make, if there is one, after the end of training."""
        self._survivors.attend()
        call = self._calls.pending()
        if not call or self._shadow.open_step is not None or self._is_leaving:
            return
        if not self._has_told:
            self._has_told = True
            _log.warning(
                "rank %d has left training, and takes part in %s of those that have not",
                *(self._endpoint.rank, call),
            )
        self._is_leaving = True
        try:
            if call == Call.AVERAGE:
                self.average()
            else:
                with self.paused() if call == Call.PAUSED else self.mean_model():
                    pass
        finally:
            self._is_leaving = False

    def refuse_inside(self, call: str) -> None:
        """Refuse `call` in the ``with`` block of a pause.

        Raises:
            UserError: this rank is in one.
        """
        if self.open_call:
            raise UserError(
                f"{call}: it is called inside of `with training.{self.open_call}:`, where all "
                "ranks stand still; call it after the block"
            )

    @property
    def _status(self) -> int:
        return self._membership.status[self._endpoint.rank]

    @property
    def _exchanges(self) -> bool:
        """Whether ranks still train, so that something may be in flight."""
        return self._status == RUNNING or self._is_leaving

    @property
    def _is_lockstep(self) -> bool:
        return self._shadow.in_lockstep

    def _enter(self, call: Call) -> None:
        """Do 1.

        Raises:
            Diverged: this rank's model is not finite, and would make the mean so, or has become so
                by its last step.
        """
        self._parameters.gather()
        if self._status == RUNNING:
            try:
                if call == Call.PAUSED:  # the user may write to it
                    self._local.require_finite_updates()
                else:
                    self._local.require_finite_model()
            except Diverged:
                self._membership.publish_status(FAILED)
                raise
        if self._is_leaving:
            self._calls.join(call)
        else:
            self._membership.report_activity(Activity.COLLECTIVE)
            self._calls.enter(call)
        if self._is_lockstep and self._status == RUNNING:
            follow(self._waiter, self._shadow, lambda: self._calls.have_reached(Phase.ENTERED))

    def _quiesce(self, call: Call) -> None:
        """Do 1 to 3: after it nothing is in flight.

        Raises:
            UserError: another rank makes another call, or never comes to this one.
            PeerLost: a rank has failed, or none makes progress.
        """
        endpoint, algorithm, waiter = self._endpoint, self._algorithm, self._waiter

        def absorb() -> None:
            algorithm.absorb(self._local.local_step)
            self._shadow.attend_others()

        def is_flushed() -> bool:
            if endpoint.is_flushed():
                return True
            absorb()  # ranks may wait for free slots of each other's inboxes
            return False

        def is_quiet() -> bool:
            if not endpoint.inbox.has_messages and algorithm.is_drained and endpoint.is_flushed():
                return True
            absorb()  # only if it must: that of some algorithms begins something new
            return False

        self._enter(call)
        if self._status == RUNNING:  # else `finalize` has done it
            for request in algorithm.suspend():
                waiter.poll_until(request.test)
        waiter.poll_until(is_flushed)
        self._calls.reach(Phase.STOPPED, absorb)  # 2
        waiter.poll_until(is_quiet)  # 3
        self._calls.reach(Phase.QUIET, is_quiet)
        waiter.poll_until(is_quiet)
        algorithm.settle()
        if algorithm.capabilities.one_model:
            self._adopt_newest()
        self._parameters.scatter()

    def _adopt_newest(self) -> None:
        """Copy the model of a rank that has made all steps itself, if others were shadows."""
        steps = self._membership.gradients
        if len(set(steps)) > 1:
            synchronize.copy_model(self._survivors, self._parameters, steps.index(max(steps)))

    def _meet(self, call: Call) -> None:
        """Wait for the other ranks, with what is in flight as it is."""
        if self._status in (RUNNING, FINISHED):
            self._enter(call)
            self._calls.reach(Phase.STOPPED, self._shadow.attend_others)
            self._parameters.scatter()

    @contextlib.contextmanager
    def _body(self, call: Call, go_on: Callable[[], None]) -> Iterator[None]:
        """Yield to the user's block, and go on after it; also if it fails, as others may go on."""
        self.open_call = call
        try:
            yield
        except MpiDasgdError:
            raise
        except Exception:
            self._end_body(go_on)
            raise
        self._end_body(go_on)

    def _end_body(self, go_on: Callable[[], None]) -> None:
        self.open_call = Call.NONE
        with self._device.current_stream():  # the user may have chosen another one
            go_on()

    def _look(self) -> None:
        """Look which ranks live, where `close` has not ended that."""
        if self._status != DEPARTED:
            self._waiter.check_peers()

    def _attend_others(self) -> None:
        self._shadow.attend_others()
        self._survivors.attend()

    def _average(self) -> None:
        algorithm, size = self._algorithm, self._endpoint.size
        synchronize.average_models(
            self._survivors,
            self._parameters,
            self._buffers,
            algorithm.model_ranks(size),
            algorithm.workers(size, algorithm.settings),
            model=algorithm.model,
            weight=algorithm.model_weight,
            check_finite=self._check_finite,
        )

    def _resume(self) -> None:
        """Do 5 for models that the user may have changed.

        Raises:
            UserError: they differ, where all ranks must have the same.
        """
        self._calls.reach(Phase.LEFT, self._attend_others)
        self._parameters.gather()
        if self._algorithm.capabilities.replicated:
            self._replicate()
        self._algorithm.resume(self._local.local_step)
        self._parameters.scatter()

    def _replicate(self) -> None:
        """Copy the model of the server, or compare the models."""
        ranks = self._algorithm.model_ranks(self._endpoint.size)
        if len(ranks) == 1:
            synchronize.copy_model(self._survivors, self._parameters, ranks[0])
            return
        digests = self._survivors.allgather(self._parameters.digest())
        living = [digest for digest in digests if digest is not None]
        if len(set(living)) > 1:
            common = max(living, key=living.count)
            others = [r for r, digest in enumerate(digests) if digest not in (None, common)]
            raise UserError(
                f"paused(): ranks {others} have left it with another model than the others, but "
                f"{self._algorithm.name!r} needs the same on all: write the same on every rank, "
                "or call training.average() afterwards instead"
            )

    def _leave(self, wait: bool = True) -> None:
        """Leave the call, with all ranks; one that has ended training ends its exchanges anew."""
        if self._status not in (RUNNING, FINISHED):
            return
        if self._is_leaving and wait and self._status == FINISHED:
            for request in self._algorithm.finalize():
                self._waiter.poll_until(request.test)
        self._calls.leave(self._attend_others if wait else None)
        if not self._is_leaving:
            self._membership.report_activity(Activity.OWN_CODE)
        if self._exchanges:
            self._learning_rate.begin_gradient()
