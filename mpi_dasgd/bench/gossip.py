"""Random pairwise gossip of ranks whose models only take noisy steps: what gamma and rho cost and save.

Ranks take their turn in random order: some local steps, then an exchange as in `algorithms/adpsgd.py`, with
the newest publication of a random other rank that nobody has used yet, and the deltas that have arrived.
All settings meet the same noise and the same partners; the codec `none` is one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.bench.codec_error import message
from mpi_dasgd.codecs import Codec, Message
from mpi_dasgd.kernels.encoded import BUCKET

__all__ = ["LAWS", "PHASES", "Law", "Phase", "Setting", "gossip"]

RANKS, LOCAL_STEPS, BUCKETS = 8, 3, 48
PHASES = {"1e-3": 1e-3, "1e-4": 1e-4, "jump to 3e-3": 3e-3, "drop to 1e-5": 1e-5}
"""Learning rates, one after the other."""


class Law(NamedTuple):
    """Distribution of the gradients.

    Attributes:
        freedom: of Student's t; 0 for the normal distribution.
        large: share of a bucket's elements whose gradients are larger.
        factor: by how much.
    """

    freedom: int
    large: float = 0.0
    factor: float = 1.0


LAWS = {
    "gauss": Law(0),
    "t3": Law(3),
    "gauss mixed": Law(0, 0.05, 30),
    "t3 mixed": Law(3, 0.05, 30),
}
"""In a mixed bucket 5 % of the elements have gradients 30 times larger."""


class Phase(NamedTuple):
    """What one setting did in one phase.

    Attributes:
        law, phase: of `LAWS` and `PHASES`.
        codec, gamma, rho, weight: the setting; NaN for codecs without.
        rejected: share of the buckets.
        error: median over buckets of ||what moved / weight - (x - y)|| / ||x - y||; 1 where rejected.
        disagreement: RMS distance of a model from the mean, in the second half of the phase.
        apart: the same over that of the codec `none`.
        apart_small: `apart` of the elements with small gradients.
    """

    law: str
    phase: str
    codec: str
    gamma: float
    rho: float
    weight: float
    rejected: float
    error: float
    disagreement: float
    apart: float
    apart_small: float


@dataclass
class _Rank:
    x: np.ndarray
    codec: Codec
    publication: Message
    published: np.ndarray  # the model that the publication holds
    arrived: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """A codec as the ranks of one gossip use it; gamma and rho are for the lattice."""

    codec: str
    gamma: float | None = None
    rho: float = 0.95
    weight: float = 0.5

    def codecs(self, seed: int) -> list[Codec]:
        """Make the codecs of all ranks."""
        settings = codecs.Settings(name=self.codec, scale_margin=self.gamma, scale_decay=self.rho)
        size, dtype = BUCKETS * BUCKET, np.dtype(np.float32)
        return [codecs.make(settings, size, dtype, seed=seed, rank=rank) for rank in range(RANKS)]


class _Group:
    """The ranks of one setting.

    Args:
        ranks: their codecs.
        x: the model that all begin with.
        weight: of an exchange.
    """

    def __init__(self, ranks: Sequence[Codec], x: np.ndarray, weight: float) -> None:
        self.weight = weight
        self.ranks = [_Rank(x.copy(), codec, message(codec), x.copy()) for codec in ranks]
        for rank in self.ranks:
            rank.codec.encode(rank.x, rank.publication)
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self.buckets = self.rejected = 0
        self.errors: list[np.ndarray] = []
        self.squares: list[np.ndarray] = []

    def turn(self, number: int, partner: int, step: np.ndarray) -> None:
        """Let a rank move by `step`, then exchange with a partner."""
        mine, theirs = self.ranks[number], self.ranks[partner]
        mine.x += step
        before, reply = mine.x.copy(), message(mine.codec)
        for delta in mine.arrived:
            before += mine.codec.delta(delta)
        outcome = mine.codec.average_pair(
            mine.x, mine.arrived, theirs.publication, self.weight, reply, mine.publication
        )
        self._note(mine.x - before, theirs.published - before, outcome.rejected)
        mine.arrived = []
        mine.published[:] = mine.x
        theirs.arrived.append(reply)

    def _note(self, moved: np.ndarray, apart: np.ndarray, rejected: int) -> None:
        error = moved / np.float32(self.weight) - apart
        norm, error = (
            np.linalg.norm(part.reshape(BUCKETS, BUCKET), axis=1) for part in (apart, error)
        )
        self.errors.append(error / np.where(norm > 0, norm, np.inf))
        self.buckets += BUCKETS
        self.rejected += rejected

    def look(self, small: np.ndarray) -> None:
        """Note how far the models are apart, over all elements and over small ones."""
        models = np.stack([rank.x for rank in self.ranks])
        square = np.square(models - models.mean(0)).mean(0)
        self.squares.append(np.array([square.mean(), square[small].mean()]))


class _Gradients:
    """Random gradients, the same for all settings: pieces of a pool of numbers of variance 1."""

    _POOL = 2**22

    def __init__(self, law: Law, rng: np.random.Generator) -> None:
        self._rng = rng
        pool = (
            rng.standard_t(law.freedom, self._POOL) if law.freedom else rng.normal(size=self._POOL)
        )
        self._pool = (pool / pool.std()).astype(np.float32)
        size = np.exp(rng.normal(size=(BUCKETS, 1))).repeat(BUCKET, 1)
        self.small = rng.random(size.shape) >= law.large
        self.model = (0.1 * size * rng.normal(size=size.shape)).astype(np.float32).reshape(-1)
        self.size = np.where(self.small, size, law.factor * size).astype(np.float32).reshape(-1)
        self.small = self.small.reshape(-1)

    def draw(self) -> np.ndarray:
        """Return the sum of the gradients of all local steps."""
        count = self.size.size
        total = np.zeros(count, np.float32)
        for start in self._rng.integers(0, self._POOL - count, LOCAL_STEPS):
            total += self._pool[start : start + count]
        return total * self.size


def gossip(law: str, settings: Sequence[Setting], rounds: int, seed: int) -> Iterator[Phase]:
    """Let all settings gossip side by side, `rounds` turns of each rank a phase; yield a row a phase."""
    gradients = _Gradients(LAWS[law], np.random.default_rng([seed, 3]))
    everyone = [Setting("none", weight=w) for w in sorted({s.weight for s in settings})]
    everyone += settings
    groups = [_Group(s.codecs(seed), gradients.model, s.weight) for s in everyone]
    order = random.Random(seed)
    unused = set(range(RANKS))
    for phase, rate in PHASES.items():
        for number in range(rounds):
            for rank in order.sample(range(RANKS), RANKS):
                partner = order.choice(sorted(unused - {rank}) or [(rank + 1) % RANKS])
                unused = unused - {partner} | {rank}
                step = np.float32(-rate) * gradients.draw()
                for group in groups:
                    group.turn(rank, partner, step)
            if number >= rounds // 2:
                for group in groups:
                    group.look(gradients.small)
        yield from _rows(law, phase, everyone, groups)
        for group in groups:
            group.clear()


def _rows(
    law: str, phase: str, settings: Sequence[Setting], groups: Sequence[_Group]
) -> Iterator[Phase]:
    exact: dict[float, np.ndarray] = {}  # of the codec none, with each weight
    for setting, group in zip(settings, groups, strict=True):
        both = np.sqrt(np.mean(group.squares, axis=0))
        apart, small = both / exact.setdefault(setting.weight, both)
        gamma, rho = (np.nan, np.nan) if setting.gamma is None else (setting.gamma, setting.rho)
        yield Phase(
            law, phase, setting.codec, gamma, rho, setting.weight,
            rejected=group.rejected / group.buckets,
            error=float(np.median(np.concatenate(group.errors))),
            disagreement=float(both[0]), apart=float(apart), apart_small=float(small),
        )  # fmt: skip
