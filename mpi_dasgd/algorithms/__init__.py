"""The algorithms, one file each, to be read beside their papers."""

from __future__ import annotations

from mpi_dasgd.algorithms.adpsgd import ADPSGD
from mpi_dasgd.algorithms.allreduce import AllReduce
from mpi_dasgd.algorithms.alone import Alone
from mpi_dasgd.algorithms.base import Algorithm, Exchange, Local, partners
from mpi_dasgd.errors import UserError, nearest

__all__ = ["ALGORITHMS", "Algorithm", "Exchange", "Local", "find", "partners"]

ALGORITHMS: dict[str, type[Algorithm]] = {kind.name: kind for kind in (ADPSGD, AllReduce, Alone)}


def find(name: str) -> type[Algorithm]:
    """Return the algorithm called `name`.

    Raises:
        UserError: if there is none.
    """
    if name not in ALGORITHMS:
        valid = ", ".join(ALGORITHMS)
        raise UserError(
            f"algorithm.name: {name!r} is not known{nearest(name, ALGORITHMS)} (valid: {valid})"
        )
    return ALGORITHMS[name]
