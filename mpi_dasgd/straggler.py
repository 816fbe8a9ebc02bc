"""A seeded injector of slowness, and the compute times of the virtual clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mpi_dasgd.errors import UserError, nearest

__all__ = [
    "KINDS",
    "MODES",
    "TIME_KINDS",
    "ComputeTimes",
    "Straggler",
    "StragglerSettings",
    "resolve_ranks",
]

KINDS = ("none", "constant", "lognormal", "exponential", "pause")
RANDOM_KINDS = ("lognormal", "exponential")  # each rank draws its own factors
MODES = ("sleep", "work")
TIME_KINDS = ("constant", "uniform", "lognormal", "exponential")


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


@dataclass(frozen=True)
class StragglerSettings:
    """Who is slowed, how and by how much.

    Slowness can only be added, so the random kinds stretch the steps whose factor exceeds 1 and
    leave the others as they are.

    Attributes:
        kind: `none`; `constant`: every step takes `factor` times as long; `lognormal`: a step's
            factor is exp(sigma z - sigma^2 / 2), of mean 1, so that steps take 2 Phi(sigma / 2)
            times as long on average; `exponential`: a step's factor is exponential of mean 1, so
            that steps take 1 + 1/e times as long on average; `pause`: every `period`-th step is
            followed by a pause of `pause` seconds.
        ranks: of `constant` and `pause`, the slowed ranks, negative ones from the end; empty means
            every rank (`constant` wants them named). The random kinds slow every rank.
        factor: of `constant`, at least 1.
        mode: `sleep` leaves the core to others meanwhile, `work` keeps it busy.
        sigma: of `lognormal`, above 0.
        period: of `pause`, in steps, at least 1.
        pause: of `pause`, in seconds.

    Raises:
        UserError: a value is out of its range.
    """

    kind: str = "none"
    ranks: tuple[int, ...] = ()
    factor: float = 2.0
    mode: str = "sleep"
    sigma: float = 0.5
    period: int = 100
    pause: float = 1.0

    def __post_init__(self) -> None:
        _check_name("straggler kind", self.kind, KINDS)
        _check_name("straggler mode", self.mode, MODES)
        if self.kind == "constant" and not self.ranks:
            raise UserError("straggler kind constant needs ranks, for example -1, the last one")
        if not (self.factor >= 1.0 and math.isfinite(self.factor)):
            raise UserError(
                f"straggler factor is how many times longer a step takes, at least 1, got "
                f"{self.factor:g}; 2 makes a rank half as fast"
            )
        _check_sigma(self.sigma)
        if self.period < 1:
            raise UserError(f"straggler period must be at least 1 step, got {self.period}")
        if not (self.pause >= 0.0 and math.isfinite(self.pause)):
            raise UserError(f"straggler pause must be 0 seconds or more, got {self.pause:g}")


class Straggler:
    """Slows the steps of one rank down; the same seed slows the same steps by the same factors.

    The draws belong to (seed, rank, step), so that a run that is resumed continues its sequence.

    Raises:
        UserError: a rank of the settings does not exist among `size` ranks.
    """

    def __init__(self, settings: StragglerSettings, rank: int, size: int, seed: int) -> None:
        slowed = resolve_ranks(settings.ranks, size)
        if not slowed or settings.kind in RANDOM_KINDS:
            slowed = frozenset(range(size))
        self.settings = settings
        self.active = settings.kind != "none" and rank in slowed
        self._entropy = (seed, rank)

    def extra_seconds(self, step: int, compute_seconds: float) -> float:
        """Return by how many seconds `step` (from 0), which took `compute_seconds`, is too fast."""
        settings = self.settings
        if not self.active:
            return 0.0
        if settings.kind == "constant":
            return (settings.factor - 1.0) * compute_seconds
        if settings.kind == "pause":
            return settings.pause if (step + 1) % settings.period == 0 else 0.0
        rng = np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(step,)))
        return max(0.0, _factor(settings.kind, settings.sigma, rng) - 1.0) * compute_seconds

    def slow_down(
        self, step: int, compute_seconds: float, repeat: Callable[[], object] | None = None
    ) -> None:
        """Make `step` last `extra_seconds` longer.

        Args:
            step: step of this rank, from 0.
            compute_seconds: how long its gradient took.
            repeat: computes the gradient once more. In mode `work`, kind `constant` calls it
                factor - 1 times and keeps the core busy for the fraction that is left; all else
                keeps the core busy for the time.
        """
        extra = self.extra_seconds(step, compute_seconds)
        if extra <= 0.0:
            return
        if self.settings.mode == "sleep":
            time.sleep(extra)
            return
        if self.settings.kind == "constant" and repeat is not None:
            fraction, repeats = math.modf(self.settings.factor - 1.0)
            for _ in range(int(repeats)):
                repeat()
            extra = fraction * compute_seconds
        _compute_for(extra)


@dataclass(frozen=True)
class ComputeTimes:
    """How long a gradient takes on the virtual clock.

    Attributes:
        kind: one of `TIME_KINDS`; `uniform` is 0.5 to 1.5 of the mean.
        mean: mean of a rank that is not slow, in seconds, above 0.
        sigma: of `lognormal`, above 0.
        slow_ranks: ranks that take `slow_factor` times as long; see `resolve_ranks`.
        slow_factor: at least 1.

    Raises:
        UserError: a value is out of its range.
    """

    kind: str = "constant"
    mean: float = 1.0
    sigma: float = 0.5
    slow_ranks: frozenset[int] = frozenset()
    slow_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_name("compute time", self.kind, TIME_KINDS)
        if not (self.mean > 0.0 and math.isfinite(self.mean)):
            raise UserError(f"mean compute time must be above 0 seconds, got {self.mean:g}")
        _check_sigma(self.sigma)
        if not (self.slow_factor >= 1.0 and math.isfinite(self.slow_factor)):
            raise UserError(f"slow_factor must be at least 1, got {self.slow_factor:g}")
        if any(rank < 0 for rank in self.slow_ranks):
            raise UserError(
                f"slow_ranks must be 0 or more, got {sorted(self.slow_ranks)}; resolve_ranks turns "
                "ranks from the end into these"
            )

    def draw(self, rank: int, rng: np.random.Generator) -> float:
        """Draw the seconds that the next gradient of `rank` takes."""
        slow = self.slow_factor if rank in self.slow_ranks else 1.0
        return slow * self.mean * _factor(self.kind, self.sigma, rng)


def _factor(kind: str, sigma: float, rng: np.random.Generator) -> float:
    """Draw a factor of mean 1."""
    if kind == "lognormal":
        return float(rng.lognormal(-(sigma**2) / 2.0, sigma))
    if kind == "exponential":
        return float(rng.exponential())
    if kind == "uniform":
        return 0.5 + rng.random()  # as rng.uniform(0.5, 1.5), which takes several times as long
    return 1.0


def _compute_for(seconds: float) -> None:
    """Keep this core busy with arithmetic for `seconds`."""
    end = time.perf_counter() + seconds
    # One core only, and without the GIL, like the gradient that it stands for.
    block = np.ones(1 << 16)
    while time.perf_counter() < end:
        np.sqrt(block, out=block)


def _check_name(what: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        hint = nearest(name, valid)
        raise UserError(f"{what} {name!r} is unknown; it is one of {', '.join(valid)}{hint}")


def _check_sigma(sigma: float) -> None:
    if not (sigma > 0.0 and math.isfinite(sigma)):
        raise UserError(f"sigma of lognormal times must be above 0, got {sigma:g}")
