"""What all algorithms share: the skeleton of a step, and the record of an exchange.

An algorithm is the code of one rank. `Algorithm.step` is a generator that yields only where it must
wait for other ranks; asynchronous algorithms never do, and that they never do is tested. The trainer
drives it against MPI windows, the simulator drives the same code on a virtual clock.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from mpi_dasgd.codecs import Codec
from mpi_dasgd.config import Algorithm as Settings
from mpi_dasgd.errors import UserError
from mpi_dasgd.storage.schema import ABSORBED, INITIATED, SKIPPED
from mpi_dasgd.transport.endpoint import Endpoint, Pending

__all__ = ["ABSORBED", "INITIATED", "SKIPPED", "Algorithm", "Exchange", "Local", "partners"]


def partners(seed: int, rank: int) -> random.Random:
    """Return the source of a rank's random choices; NumPy's is slower for so few."""
    return random.Random(f"mpi_dasgd partners {seed} {rank}")


class Local(Protocol):
    """What an algorithm sees of its own rank's training.

    Attributes:
        step: number of gradients computed so far, from 1.
        gradient: the newest gradient, 1-D, padded like the model.
    """

    step: int

    @property
    def gradient(self) -> np.ndarray: ...

    def update(self) -> None:
        """Apply the gradient to the model: one step of the local optimizer."""


class Exchange(NamedTuple):
    """Record of one average, seen from one of its sides.

    Attributes:
        step: own step.
        partner: the other rank, -1 if none was found.
        kind: INITIATED, ABSORBED or SKIPPED.
        partner_step: step at which the partner's model or delta was made, -1 if there was none.
        age_s: seconds since then.
        nbytes: bytes moved by this rank.
        retries: candidates that were taken or full before one was found.
        distance: ||x_i - x_j||_2 before the average; NaN if it was not measured.
        rejected: buckets of the partner's publication that could not be decoded.
    """

    step: int
    partner: int
    kind: int
    partner_step: int
    age_s: float
    nbytes: int
    retries: int
    distance: float = float("nan")
    rejected: int = 0


class Algorithm(ABC):
    """Base of all algorithms.

    Args:
        endpoint: the other ranks.
        codec: what crosses the wire.
        x: this rank's model, 1-D, padded; the algorithm changes it in place.
        settings: section ``algorithm`` of the configuration.
        rng: source of this rank's random choices.
        record: called with every exchange.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    synchronous: ClassVar[bool] = False
    """Whether ranks wait for each other, so that all make the same number of steps."""
    minimum_ranks: ClassVar[int] = 1
    publishes: ClassVar[bool] = True

    def __init__(
        self,
        endpoint: Endpoint,
        codec: Codec,
        x: np.ndarray,
        settings: Settings,
        rng: random.Random,
        record: Callable[[Exchange], None],
    ) -> None:
        self.check(endpoint.size, settings)
        self.endpoint = endpoint
        self.codec = codec
        self.x = x
        self.settings = settings
        self.rng = rng
        self.record = record

    @classmethod
    def check(cls, ranks: int, settings: Settings) -> None:
        """Refuse settings that this algorithm cannot work with.

        Raises:
            UserError: says why, and what would do.
        """
        if ranks < cls.minimum_ranks:
            raise UserError(
                f"algorithm.name: {cls.name!r} needs at least {cls.minimum_ranks} ranks, got {ranks}; "
                "start it with `mpi-dasgd launch -n 4 train ...`, or mpirun -n 4"
            )

    def start(self) -> None:
        """Called once, when all ranks have the same model."""

    def restart(self, step: int) -> None:
        """Called when the model was replaced by that of a checkpoint, taken after `step`."""

    @abstractmethod
    def step(self, local: Local) -> Iterator[Pending]:
        """One step: called when a gradient is ready."""

    def absorb(self, step: int) -> None:
        """Take in what has arrived, outside of a step; `step` is the last one made."""

    def leave(self) -> Iterator[Pending]:
        """Give back what is held of other ranks: called once, after the last step."""
        return iter(())
