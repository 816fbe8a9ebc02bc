"""Learning-rate schedules over global progress.

Ranks of an asynchronous run finish different numbers of steps, so every schedule is a function of
the share of the budget that all ranks together have used, never of a rank's own step count.
"""

from __future__ import annotations

import math

from mpi_dasgd.config.schema import ScheduleConfig

__all__ = ["Schedule"]


class Schedule:
    """A factor on the base learning rate as a function of global progress.

    - `constant`: 1.
    - `cosine`: falls from 1, at the end of the warm-up, to `config.end_factor` at progress 1
      (Loshchilov and Hutter, 2017, without restarts).
    - `step`: multiplies by `config.gamma` at each of `config.milestones`.

    A warm-up multiplies the factor by a line that rises from `config.warmup_start_factor` at
    progress 0 to 1 at progress `config.warmup`.

    Args:
        config: section ``schedule`` of a configuration.

    Attributes:
        is_constant: whether the factor is 1 at any progress.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        # Asked in every step: what of it does not change is worked out here.
        self._name, self._warmup = config.name, config.warmup
        self._warmup_start = config.warmup_start_factor
        self._end, self._range = config.end_factor, 1.0 - config.end_factor
        self._gamma, self._milestones = config.gamma, config.milestones
        self.is_constant = config.name == "constant" and config.warmup == 0

    def factor(self, progress: float) -> float:
        """Return the factor on the base learning rate.

        Args:
            progress: share of the budget that all ranks together have used; above 1 if ranks in
                the middle of a step overrun it.
        """
        progress = min(1.0, progress)  # cosine would rise again beyond the budget
        warmup, factor = self._warmup, 1.0
        if self._name == "cosine":
            elapsed = max(0.0, progress - warmup) / (1.0 - warmup)
            factor = self._end + self._range * (1.0 + math.cos(math.pi * elapsed)) / 2.0
        elif self._name == "step":
            factor = self._gamma ** sum(progress >= milestone for milestone in self._milestones)
        if progress < warmup:
            start = self._warmup_start
            factor *= start + (1.0 - start) * progress / warmup
        return factor
