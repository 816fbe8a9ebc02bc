"""Which budgets, schedules and checkpoints are consistent."""

from __future__ import annotations

from mpi_dasgd.config.schema import Config
from mpi_dasgd.errors import UserError

__all__ = ["validate"]


def validate(config: Config, name: str, lockstep: bool) -> None:
    """Refuse budgets with which the ranks could not train as configured.

    Args:
        config: configuration of the run.
        name: name of its algorithm.
        lockstep: whether all ranks make the same number of steps.

    Raises:
        UserError: with the reason, and what to set instead.
    """
    budget, schedule = config.budget, config.schedule
    varies = schedule.name != "constant" or schedule.warmup > 0
    if budget.epochs is not None and budget.samples is None:
        raise UserError(
            "budget.epochs: `Decentralized` does not know the data set; give budget.samples, the "
            "size of the data set times the epochs"
        )
    if varies and budget.samples is None and budget.seconds is None:
        raise UserError(
            f"schedule: {schedule.name!r} with warmup = {schedule.warmup:g} is a function of the "
            "share of the budget that is used, and there is no budget; give budget.samples or "
            "budget.seconds"
        )
    if lockstep and budget.seconds is not None and varies:
        raise UserError(
            f"schedule: {name!r} with budget.seconds needs 'constant' without warm-up, or the "
            "ranks' learning rates would differ; give budget.samples or budget.epochs instead"
        )
    if lockstep and budget.seconds is not None and config.checkpoint.count:
        raise UserError(
            f"checkpoint.count: {name!r} with budget.seconds would save its ranks at different "
            "steps; give budget.samples or budget.epochs instead"
        )
