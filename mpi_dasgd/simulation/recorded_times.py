"""Step times of a recorded run: they let virtual ranks compute at the speeds of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpi_dasgd.analysis.load import load_run
from mpi_dasgd.errors import UserError

__all__ = ["RecordedTimes", "recorded_times"]


class RecordedTimes:
    """Repeats the times of each rank's steps in their order, and from the first again at the end.

    Args:
        compute: seconds of the gradients, (steps,) per rank.
        exchange: seconds of the exchanges that followed each gradient, (steps,) per rank.
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
        """Return the seconds between the newest gradient of `rank` and the start of the next."""
        return float(self._exchange[rank][self._step[rank]])


def recorded_times(run: str | Path, ranks: int) -> RecordedTimes:
    """Read the times of a run's steps: gradients with data and optimizer, and exchanges.

    Waiting for other ranks is left out: it arises again on the virtual clock.

    Args:
        run: run directory or results.h5.
        ranks: number of virtual ranks.

    Raises:
        UserError: there is no such run, or it has another number of ranks.
    """
    results = load_run(run).results
    if len(results.rank) != ranks:
        raise UserError(
            f"simulation.recorded_run: {run} has {len(results.rank)} ranks, and {ranks} are "
            f"simulated: set simulation.ranks={len(results.rank)}"
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
