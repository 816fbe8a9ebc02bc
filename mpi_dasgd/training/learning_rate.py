"""Learning rate of each gradient: a function of progress and of the gradient's delay."""

from __future__ import annotations

from mpi_dasgd.algorithms.build import RunParts
from mpi_dasgd.staleness.step_rule import constant_step
from mpi_dasgd.training.budget import Budget
from mpi_dasgd.transport.endpoint import Endpoint

__all__ = ["LearningRate"]


class LearningRate:
    """Factor on the learning rate of each gradient: that of the schedule times that of the delay.

    Args:
        parts: parts of the run.
        endpoint: counts the gradients of all ranks.

    Attributes:
        gradients_seen: gradients of all ranks when this one began to compute its newest.
        delay: gradients that other ranks computed while this one computed its newest.
        delay_factor: factor that `algorithm.delay_adaptive_rule` gave for `delay`.
    """

    def __init__(self, parts: RunParts, endpoint: Endpoint) -> None:
        self.gradients_seen = 0
        self.delay, self.delay_factor = 0, 1.0
        self._schedule, self._step_rule = parts.schedule, parts.step_rule
        self._applies_step_rule = not (
            parts.algorithm_cls.capabilities.applies_step_rule or parts.step_rule is constant_step
        )
        self._endpoint = endpoint

    def scheduled(self, progress: float) -> float:
        """Return the factor of the schedule at `progress`, a fraction of the budget."""
        return self._schedule.factor(progress)

    def of_gradient(self, gradients: int, budget: Budget) -> float:
        """Measure the delay of the gradient just counted; return its factor.

        Args:
            gradients: gradients of all ranks so far, with this one.
            budget: budget of the run, whose progress the schedule follows.
        """
        self.delay = max(0, gradients - self.gradients_seen - 1)
        schedule = self._schedule
        factor = 1.0 if schedule.is_constant else schedule.factor(budget.progress_of_step())
        if self._applies_step_rule:
            self.delay_factor = self._step_rule(self.delay)
            factor *= self.delay_factor
        return factor

    def begin_gradient(self) -> None:
        """Note the gradients of all ranks so far: those that come now delay the next one."""
        self.gradients_seen = self._endpoint.gradients()
