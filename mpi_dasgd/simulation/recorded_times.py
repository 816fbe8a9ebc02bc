"""Step times of a run that was recorded, for the virtual clock: the same ranks at the same speeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.errors import UserError

__all__ = ["RecordedTimes", "recorded_times"]


class RecordedTimes:
    """Repeats what each rank took for its steps, in order, from the beginning again after the end.

    Args:
        compute: seconds of the gradients of each rank, (steps,).
        exchange: seconds of what followed each of them, (steps,).
    """

    def __init__(self, compute: Sequence[np.ndarray], exchange: Sequence[np.ndarray]) -> None:
        self._compute = [values.tolist() for values in compute]
        self._exchange = [values.tolist() for values in exchange]
        self._step = [-1] * len(compute)

    def draw(self, rank: int, rng: np.random.Generator) -> float:
        """Return the seconds of the next gradient of `rank`; nothing is drawn from `rng`."""
        values = self._compute[rank]
        self._step[rank] = (self._step[rank] + 1) % len(values)
        return float(values[self._step[rank]])

    def exchange_seconds(self, rank: int) -> float:
        """Return the seconds between the newest gradient of `rank` and the beginning of the next."""
        return float(self._exchange[rank][self._step[rank]])


def recorded_times(run: str | Path, ranks: int) -> RecordedTimes:
    """Read how long the steps of a run took: gradients with all that goes with them, and exchanges.

    Waiting for other ranks is left out: on the virtual clock it comes about anew.

    Args:
        run: run directory or results.h5.
        ranks: that are simulated.

    Raises:
        UserError: no such run, or one of another number of ranks.
    """
    results = load_run(run).results
    if len(results.rank) != ranks:
        raise UserError(
            f"simulation.recorded_run: {run} has {len(results.rank)} ranks, and {ranks} are simulated: "
            f"set simulation.ranks={len(results.rank)}"
        )
    table = results.tables["train"]
    compute, exchange = [], []
    for row, steps in enumerate(results.n_records["train"]):
        if not steps:
            compute.append(np.ones(1))  # a server: it makes no steps
            exchange.append(np.zeros(1))
            continue
        whole = np.diff(table["time_s"][row, :steps], prepend=0.0) - table["wait_s"][row, :steps]
        exchange.append(table["exchange_s"][row, :steps])
        compute.append(np.maximum(whole - exchange[-1], 1e-9))
    return RecordedTimes(compute, exchange)
