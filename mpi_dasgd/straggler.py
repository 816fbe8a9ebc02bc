"""A seeded injector of slowness: it makes chosen steps of chosen ranks take longer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np

from mpi_dasgd.config.schema import StragglerConfig
from mpi_dasgd.errors import UserError

__all__ = ["Straggler", "random_factor", "resolve_ranks"]

RANDOM_DISTRIBUTIONS = ("lognormal", "exponential")
"""Distributions of which each rank draws its own factors."""


def resolve_ranks(ranks: Iterable[int], size: int) -> frozenset[int]:
    """Return `ranks` as numbers in 0..size-1; negative ones count from the end, -1 is the last.

    Raises:
        UserError: a rank lies outside -size..size-1.
    """
    ranks = tuple(ranks)
    for rank in ranks:
        if not -size <= rank < size:
            raise UserError(
                f"straggler rank {rank} does not exist: with {size} ranks use {-size} to {size - 1}"
            )
    return frozenset(rank % size for rank in ranks)


def random_factor(distribution: str, sigma: float, rng: np.random.Generator) -> float:
    """Draw a factor of mean 1 on the time of a step.

    Args:
        distribution: `lognormal`, `exponential`, `uniform` (0.5 to 1.5); any other is exactly 1.
        sigma: standard deviation of the logarithm of a `lognormal` factor.
        rng: source of the draw.
    """
    if distribution == "lognormal":
        return float(rng.lognormal(-(sigma**2) / 2.0, sigma))
    if distribution == "exponential":
        return float(rng.exponential())
    if distribution == "uniform":
        return 0.5 + rng.random()  # as rng.uniform(0.5, 1.5), which takes several times as long
    return 1.0


class Straggler:
    """Slows the steps of one rank down; the same seed slows the same steps by the same factors.

    Slowness can only be added, so random factors, of mean 1, stretch the steps for which they
    exceed 1 and leave the others as they are: with `lognormal` factors exp(sigma z - sigma^2 / 2)
    steps take 2 Phi(sigma / 2) times as long on average, with `exponential` ones 1 + 1/e times.
    Random factors slow every rank; `constant` and `pause` slow `config.ranks`, or every rank if it
    is empty.

    The draws belong to (seed, rank, step), so that a run that is resumed continues its sequence.

    Args:
        config: section ``straggler`` of a configuration.
        rank: rank whose steps are slowed.
        size: number of ranks.
        seed: seed of the run.

    Attributes:
        config: as given.
        active: whether any step of this rank is slowed.

    Raises:
        UserError: a rank of `config` does not exist among `size` ranks.
    """

    def __init__(self, config: StragglerConfig, rank: int, size: int, seed: int) -> None:
        slowed = resolve_ranks(config.ranks, size)
        if not slowed or config.distribution in RANDOM_DISTRIBUTIONS:
            slowed = frozenset(range(size))
        self.config = config
        self.active = config.distribution != "none" and rank in slowed
        self._entropy = (seed, rank)

    def extra_seconds(self, step: int, compute_seconds: float) -> float:
        """Return the delay in seconds to add to `step`, given that it took `compute_seconds`.

        Args:
            step: step of this rank, from 0.
            compute_seconds: time that its gradient took.
        """
        config = self.config
        if not self.active:
            return 0.0
        if config.distribution == "constant":
            return (config.factor - 1.0) * compute_seconds
        if config.distribution == "pause":
            return config.pause if (step + 1) % config.period == 0 else 0.0
        rng = np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(step,)))
        return (
            max(0.0, random_factor(config.distribution, config.sigma, rng) - 1.0) * compute_seconds
        )

    def slow_down(
        self,
        step: int,
        compute_seconds: float,
        repeat: Callable[[], object] | None = None,
        *,
        wait: Callable[[], object] | None = None,
        keep_busy: Callable[[float], object] | None = None,
    ) -> None:
        """Make `step` last `extra_seconds` longer.

        Args:
            step: step of this rank, from 0.
            compute_seconds: time that its gradient took.
            repeat: computes the gradient once more. In mode `busy`, distribution `constant` calls
                it factor - 1 times, rounded down, and keeps the core busy for the remaining
                fraction; other distributions, and `repeat` None, keep it busy for the whole time.
            wait: waits until the gradient is computed, where it was only asked of a GPU: a sleep
                beside it would slow nothing down.
            keep_busy: keeps what computes gradients busy for a number of seconds; None: this core.
        """
        extra = self.extra_seconds(step, compute_seconds)
        if extra <= 0.0:
            return
        if self.config.mode == "sleep":
            if wait is not None:
                wait()
            time.sleep(extra)
            return
        if self.config.distribution == "constant" and repeat is not None:
            fraction, repeats = math.modf(self.config.factor - 1.0)
            for _ in range(int(repeats)):
                repeat()
            extra = fraction * compute_seconds
        (keep_busy or _keep_core_busy)(extra)


def _keep_core_busy(seconds: float) -> None:
    """Compute on this core for `seconds`."""
    end = time.perf_counter() + seconds
    # One core only, and without the GIL, like the gradient that it stands for.
    block = np.ones(1 << 16)
    while time.perf_counter() < end:
        np.sqrt(block, out=block)
