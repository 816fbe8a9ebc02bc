"""Settings that contradict each other are refused."""

from __future__ import annotations

import pytest

from mpi_dasgd import config
from mpi_dasgd.config import consistency
from mpi_dasgd.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "in_step", "words"),
    [
        (["budget.epochs=3"], False, r"budget\.epochs: .* does not know the data set"),
        (["schedule.name=cosine"], False, "there is no budget"),
        (["schedule.warmup=0.1"], False, "there is no budget"),
        (["schedule.name=cosine", "budget.seconds=1"], True, "learning rates would differ"),
        (["schedule.warmup=0.1", "budget.seconds=1"], True, "learning rates would differ"),
        (["checkpoint.count=2", "budget.seconds=1"], True, "at different steps"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(
    overrides: list[str], in_step: bool, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        consistency.validate(config.load(None, overrides), "some", in_step)


@pytest.mark.parametrize(
    ("overrides", "in_step"),
    [
        ([], False),
        (["schedule.name=cosine", "budget.samples=9", "checkpoint.count=2"], True),
        (["schedule.name=cosine", "budget.seconds=1", "checkpoint.count=2"], False),
        (["budget.seconds=1"], True),
    ],
)
def test_other_budgets_are_not(overrides: list[str], in_step: bool) -> None:
    consistency.validate(config.load(None, overrides), "some", in_step)
