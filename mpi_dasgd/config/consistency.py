"""Which budgets, schedules and checkpoints go together."""

from __future__ import annotations

from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError

__all__ = ["check"]


def check(config: Config, name: str, in_step: bool) -> None:
    """Refuse budgets with which the ranks could not go on as they are meant to.

    Args:
        config: of the run.
        name: of its algorithm.
        in_step: whether its ranks go in step.

    Raises:
        UserError: says why, and what would do.
    """
    budget, schedule = config.budget, config.schedule
    varies = schedule.name != "constant" or schedule.warmup > 0
    if budget.epochs is not None and budget.samples is None:
        raise UserError(
            "budget.epochs: `Decentralized` does not know the data set; give budget.samples, the size "
            "of the data set times the epochs"
        )
    if varies and budget.samples is None and budget.seconds is None:
        raise UserError(
            f"schedule: {schedule.name!r} with warmup = {schedule.warmup:g} is a function of the share of "
            "the budget that is used, and there is no budget; give budget.samples or budget.seconds"
        )
    if in_step and budget.seconds is not None and varies:
        raise UserError(
            f"schedule: {name!r} with budget.seconds needs 'constant' without warm-up, or the ranks' "
            "learning rates would differ; give budget.samples or budget.epochs instead"
        )
    if in_step and budget.seconds is not None and config.checkpoint.count:
        raise UserError(
            f"checkpoint.count: {name!r} with budget.seconds would save its ranks at different steps; "
            "give budget.samples or budget.epochs instead"
        )
