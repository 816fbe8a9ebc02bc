"""The steps of one rank: a gradient is counted, applied and exchanged."""

from __future__ import annotations

import operator
import time
from typing import Any

from mpi_dasgd.errors import UserError
from mpi_dasgd.training.budget import Budget
from mpi_dasgd.training.closure import Closure
from mpi_dasgd.training.join import Shadow
from mpi_dasgd.training.learning_rate import LearningRate
from mpi_dasgd.training.pause import Pauses
from mpi_dasgd.training.rank_parts import RankParts
from mpi_dasgd.training.replica_check import ReplicaCheck
from mpi_dasgd.training.step_refusals import refuse_serving, refuse_step
from mpi_dasgd.training.waiter import Waiter
from mpi_dasgd.transport.membership import RUNNING

__all__ = ["Stepper"]


class Stepper:
    """Makes the steps of one rank.

    Args:
        parts: parts of this rank.
        budget: budget of the run.
        learning_rate: factors on the learning rate.
        waiter: waits for the other ranks.
        shadow: takes part in the steps of others.
        pauses: in which no steps are made.

    Attributes:
        exchange_seconds: time spent in exchanges so far, waiting included.
        may_step: whether this rank computes gradients, has budget left, and has not left training.
    """

    def __init__(
        self,
        parts: RankParts,
        budget: Budget,
        learning_rate: LearningRate,
        waiter: Waiter,
        shadow: Shadow,
        pauses: Pauses,
    ) -> None:
        self.exchange_seconds = 0.0
        self.may_step = parts.algorithm.computes_gradients
        self._parameters, self._local = parts.parameters, parts.local
        self._device = parts.parameters.device
        self._endpoint, self._algorithm = parts.endpoint, parts.algorithm
        self._membership = parts.endpoint.membership
        self._budget = budget
        self._learning_rate = learning_rate
        self._waiter = waiter
        self._shadow = shadow
        self._pauses = pauses
        parts.endpoint.run_ahead.on_caught_up = parts.local.refuse_known_updates
        self._replicas = (
            ReplicaCheck(
                parts.endpoint, parts.parameters.vector, parts.algorithm.name, self._device
            )
            if parts.algorithm.capabilities.one_model
            else None
        )

    @property
    def _is_running(self) -> bool:
        return self._membership.status[self._endpoint.rank] == RUNNING

    def step(self, samples: int, closure: Closure | None) -> Any:
        """Make a step of the algorithm; see `Decentralized.step`."""
        if not self._device.is_asynchronous:  # where a `with` costs a microsecond for nothing
            return self._step(samples, closure)
        with self._device.current_stream():
            return self._step(samples, closure)

    def _step(self, samples: int, closure: Closure | None) -> Any:
        if not self.may_step or self._pauses.open_call:
            self._pauses.refuse_inside("step()")
            refuse_step(self._algorithm, self._is_running)
        local, budget = self._local, self._budget
        started, updated = time.perf_counter(), local.update_seconds
        if self._shadow.open_step is not None:
            self._waiter.wait(self._shadow.advance)
        self._parameters.gather()
        budget.samples += samples if type(samples) is int and samples >= 0 else _count(samples)
        local.begin_step(closure)
        if self._device.is_asynchronous:
            run_ahead = self._endpoint.run_ahead
            if closure is None:
                run_ahead.begin_step()
            else:
                closure.on_gradient = run_ahead.begin_step
        gradients = self._endpoint.begin_step(local.local_step)
        local.lr_scale = self._learning_rate.of_gradient(gradients, budget)
        budget.declare_last_step(local.local_step)
        try:
            for request in self._algorithm.step(local):
                self._waiter.wait(request.test)
        except BaseException:
            self._shadow.undo_step()
            raise
        self._endpoint.flush()
        self._parameters.scatter()
        self._learning_rate.gradients_seen = self._endpoint.end_step(budget.samples)
        if self._replicas is not None:
            self._replicas.after_step(local.local_step)
        self._waiter.check_peers_if_due()
        self.may_step = not budget.was_spent(local.local_step)
        self.exchange_seconds += time.perf_counter() - started - (local.update_seconds - updated)
        return local.loss

    def serve(self) -> None:
        """Process messages of other ranks for a moment; see `Decentralized.serve`."""
        refuse_serving(self._algorithm, self._is_running)
        self._pauses.refuse_inside("serve()")
        with self._device.current_stream():
            self._parameters.gather()
            self._local.lr_scale = self._learning_rate.scheduled(self._budget.progress)
            self._waiter.poll(lambda: self._algorithm.serve(self._local))
            self._endpoint.flush()
            self._parameters.scatter()
        self._waiter.check_peers_if_due()


def _count(samples: int) -> int:
    """Return a number of samples as an integer.

    Raises:
        UserError: it is none, or negative.
    """
    try:
        count = operator.index(samples)
    except TypeError:
        count = -1
    if count < 0:
        raise UserError(
            f"samples: expected the number of samples of a batch, 0 or more, got {samples!r}; "
            "len(batch) is one"
        )
    return count
