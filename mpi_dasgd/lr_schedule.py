"""The learning rate: schedules over global progress, and the rule that adapts it to the delay.

Ranks of an asynchronous run finish different numbers of steps, so every schedule here is a function
of the share of the budget that all ranks together have used, never of a rank's own step count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from mpi_dasgd.config.schema import AlgorithmConfig as Settings
from mpi_dasgd.errors import UserError, nearest

__all__ = ["NAMES", "Schedule", "delay_adaptive", "delay_rule", "global_progress"]

NAMES = ("constant", "cosine", "step")


def global_progress(samples: Iterable[int], budget: int) -> float:
    """Return the share of `budget` (samples) that all ranks have used, in [0, 1].

    Args:
        samples: samples used so far, one number per rank.
        budget: samples that the whole run may use, over all ranks.
    """
    # Ranks that are in the middle of a step when the budget ends overrun it.
    return min(1.0, sum(samples) / budget)


@dataclass(frozen=True)
class Schedule:
    """A factor on the base learning rate as a function of global progress.

    Attributes:
        name: one of `NAMES`.
        warmup: share of the budget, in [0, 1), over which a linear warm-up multiplies the factor.
        warmup_start: factor at progress 0, in [0, 1], if there is a warm-up.
        milestones: shares of the budget, ascending in (0, 1), at which `step` multiplies by gamma.
        gamma: factor of each milestone, above 0.
        final: factor that `cosine` reaches at progress 1, in [0, 1]; it falls from the end of the
            warm-up on (Loshchilov and Hutter, 2017, without restarts).

    Raises:
        UserError: a value is out of its range, or `step` has no milestones.
    """

    name: str = "constant"
    warmup: float = 0.0
    warmup_start: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            hint = nearest(self.name, NAMES)
            raise UserError(
                f"schedule {self.name!r} is unknown; it is one of {', '.join(NAMES)}{hint}"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(
                f"warmup is a share of the budget from 0 to below 1, got {self.warmup:g}; "
                "divide a number of samples by the budget"
            )
        for name, value in (("warmup_start", self.warmup_start), ("final", self.final)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"{name} is a factor on the learning rate, 0 to 1, got {value:g}")
        if not (self.gamma > 0.0 and math.isfinite(self.gamma)):
            raise UserError(f"gamma must be above 0, got {self.gamma:g}")
        bounds = (0.0, *self.milestones, 1.0)
        if not all(low < high for low, high in pairwise(bounds)):
            raise UserError(
                "milestones are shares of the budget, ascending and between 0 and 1, got "
                f"{', '.join(f'{m:g}' for m in self.milestones)}; divide epochs by their total"
            )
        if self.name == "step" and not self.milestones:
            raise UserError("schedule step needs milestones, for example 0.5 and 0.75")

    def factor(self, progress: float) -> float:
        """Return the factor on the base learning rate at `progress` (see `global_progress`)."""
        progress = min(1.0, progress)  # cosine would rise again beyond the budget
        factor = 1.0
        if self.name == "cosine":
            part = max(0.0, progress - self.warmup) / (1.0 - self.warmup)
            factor = self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * part)) / 2.0
        elif self.name == "step":
            factor = self.gamma ** sum(progress >= milestone for milestone in self.milestones)
        if progress < self.warmup:
            factor *= self.warmup_start + (1.0 - self.warmup_start) * progress / self.warmup
        return factor


def delay_adaptive(delay: int, threshold: float, cap: float | None = None) -> float:
    """Return the factor on the learning rate of a gradient that is `delay` updates old.

    Theorem 8 of Koloskova, Stich and Jaggi (2022): the rate eta stays for delays up to the
    threshold tau_C (their choice: the number of ranks) and lies in [0, min(eta, 1/(4 L delay)))
    beyond. L is unknown, so two rules are offered:

    - without `cap`, eta / delay, their advice: no new parameter, but the factor drops from 1 to
      1 / (threshold + 1) at once;
    - with `cap`, min(eta, c / delay), where `cap` = c / eta is in updates and the theorem wants
      c <= 1/(4L); `cap` = threshold makes it continuous, `cap` = 0 drops the gradient.

    With data that differ between ranks whose speeds differ too, the rule biases the model towards
    the data of the fast ranks.

    Args:
        delay: updates applied between the read of the model and the use of its gradient, >= 0.
        threshold: largest delay that keeps the full rate, >= 0.
        cap: c / eta, >= 0, or None.
    """
    if delay <= threshold:
        return 1.0
    return min(1.0, (1.0 if cap is None else cap) / delay)


def delay_rule(settings: Settings, ranks: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the delay, as a run is configured.

    Args:
        settings: section ``algorithm``: step_rule, delay_threshold, delay_cap.
        ranks: the threshold where none is given.
    """
    threshold = ranks if settings.delay_threshold is None else settings.delay_threshold
    cap = {
        "inverse": None,
        "capped": threshold if settings.delay_cap is None else settings.delay_cap,
        "drop": 0.0,
    }
    if settings.step_rule == "constant":
        return lambda delay: 1.0
    return lambda delay: delay_adaptive(delay, threshold, cap[settings.step_rule])
