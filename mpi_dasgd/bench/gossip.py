"""Random pairwise gossip with noisy steps only: effect of the margin and decay of the scale.

Ranks take turns in random order. In its turn a rank makes some local steps and then an exchange as
in `mpi_dasgd.algorithms.adpsgd`: with the newest publication of a random partner, if possible one
that no rank has used yet, and with the deltas it has received. All codec settings get the same
noise and the same partners; the codec `none` is always among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mpi_dasgd import codecs
from mpi_dasgd.bench.codec_error import empty_message
from mpi_dasgd.bench.gossip_gradients import BUCKETS, DISTRIBUTIONS, RandomGradients
from mpi_dasgd.codecs import Codec, ExchangeBuffers, Message
from mpi_dasgd.config.schema import CodecConfig
from mpi_dasgd.kernels.encoded import BUCKET

__all__ = ["PHASES", "RANKS", "CodecSetting", "PhaseResult", "measure_gossip"]

RANKS = 8
PHASES = {"1e-3": 1e-3, "1e-4": 1e-4, "jump to 3e-3": 3e-3, "drop to 1e-5": 1e-5}
"""Learning rates of the phases, in their order."""


class PhaseResult(NamedTuple):
    """Result of one codec setting in one phase.

    The names are columns of stored samples; `law` (distribution), `gamma` (scale_margin), `rho`
    (scale_decay), `apart` and `apart_small` keep their old names for that reason.

    Attributes:
        law: key of `DISTRIBUTIONS`.
        phase: key of `PHASES`.
        codec, gamma, rho, weight: the codec setting; gamma and rho are NaN for codecs that have
            no scale.
        rejected: share of rejected buckets.
        error: median over buckets of ||change of x / weight - (y - x)|| / ||y - x||, where y is the
            partner's publication; 1 in rejected buckets.
        disagreement: RMS distance of the models from their mean, in the second half of the phase.
        apart: `disagreement` relative to that of the codec `none`.
        apart_small: the same ratio for the elements with small gradients only.
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


@dataclass(frozen=True)
class CodecSetting:
    """A codec and its parameters.

    Attributes:
        codec: name of the codec.
        scale_margin: margin of a lattice codec's scale; None for other codecs.
        scale_decay: decay of a lattice codec's scale per exchange.
        weight: mixing weight of every exchange.
    """

    codec: str
    scale_margin: float | None = None
    scale_decay: float = 0.95
    weight: float = 0.5

    def make_codecs(self, seed: int) -> list[Codec]:
        """Return the codecs of all ranks."""
        config = CodecConfig(
            name=self.codec, scale_margin=self.scale_margin, scale_decay=self.scale_decay
        )
        size, dtype = BUCKETS * BUCKET, np.dtype(np.float32)
        return [codecs.make(config, size, dtype, seed=seed, rank=rank) for rank in range(RANKS)]


@dataclass
class _Rank:
    """State of one rank.

    Attributes:
        x: model, float32, shape (elements,).
        codec: codec of the rank.
        publication: newest publication.
        published: model in the publication, float32, shape (elements,).
        deltas: received deltas that were not applied yet.
    """

    x: np.ndarray
    codec: Codec
    publication: Message
    published: np.ndarray
    deltas: list[Message] = field(default_factory=list)


class _RankGroup:
    """All ranks with one codec setting, and their statistics of one phase.

    Args:
        rank_codecs: codecs of the ranks.
        x: initial model of all ranks, float32, shape (elements,).
        weight: mixing weight of every exchange.

    Attributes:
        buckets, rejected: number of buckets that were averaged, and that were rejected.
        errors: relative error of each bucket, shape (buckets,) per exchange.
        square_distances: mean squared distance of the models from their mean, over all elements
            and over those with small gradients, shape (2,) per round.
    """

    errors: list[np.ndarray]
    square_distances: list[np.ndarray]

    def __init__(self, rank_codecs: Sequence[Codec], x: np.ndarray, weight: float) -> None:
        self.weight = weight
        self.ranks = [
            _Rank(x.copy(), codec, empty_message(codec), x.copy()) for codec in rank_codecs
        ]
        for rank in self.ranks:
            rank.codec.encode(rank.x, rank.publication)
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Begin a new phase."""
        self.buckets = self.rejected = 0
        self.errors = []
        self.square_distances = []

    def take_turn(self, number: int, partner_number: int, step: np.ndarray) -> None:
        """Let a rank make a step and an exchange.

        Args:
            number: rank whose turn it is.
            partner_number: rank it averages with.
            step: sum of its local steps, float32, shape (elements,).
        """
        rank, partner = self.ranks[number], self.ranks[partner_number]
        rank.x += step
        before, reply_delta = rank.x.copy(), empty_message(rank.codec)
        for delta in rank.deltas:
            before += rank.codec.delta(delta)
        outcome = rank.codec.average_pair(
            rank.x,
            ExchangeBuffers(
                deltas=rank.deltas,
                partner_model=partner.publication,
                weight=self.weight,
                reply_delta=reply_delta,
                publication=rank.publication,
            ),
        )
        self._record_error(rank.x - before, partner.published - before, outcome.value().rejected)
        rank.deltas = []
        rank.published[:] = rank.x
        partner.deltas.append(reply_delta)

    def _record_error(self, change: np.ndarray, difference: np.ndarray, rejected: int) -> None:
        error = change / np.float32(self.weight) - difference
        difference_norms, error_norms = (
            np.linalg.norm(vector.reshape(BUCKETS, BUCKET), axis=1)
            for vector in (difference, error)
        )
        nonzero_norms = np.where(difference_norms > 0, difference_norms, np.inf)
        self.errors.append(error_norms / nonzero_norms)
        self.buckets += BUCKETS
        self.rejected += rejected

    def record_distance(self, small: np.ndarray) -> None:
        """Record the distance of the models from their mean.

        Args:
            small: mask of the elements with small gradients, bool, shape (elements,).
        """
        models = np.stack([rank.x for rank in self.ranks])
        square = np.square(models - models.mean(0)).mean(0)
        self.square_distances.append(np.array([square.mean(), square[small].mean()]))


def measure_gossip(
    distribution: str, settings: Sequence[CodecSetting], rounds: int, seed: int
) -> Iterator[PhaseResult]:
    """Let all settings gossip side by side, and yield the results of each in each phase.

    Args:
        distribution: key of `DISTRIBUTIONS`.
        settings: settings to compare; the codec `none` is added with each of their weights.
        rounds: turns of each rank per phase.
        seed: seed of everything random.
    """
    gradients = RandomGradients(DISTRIBUTIONS[distribution], np.random.default_rng([seed, 3]))
    all_settings = [
        CodecSetting("none", weight=weight)
        for weight in sorted({setting.weight for setting in settings})
    ]
    all_settings += settings
    groups = [
        _RankGroup(setting.make_codecs(seed), gradients.model, setting.weight)
        for setting in all_settings
    ]
    rng = random.Random(seed)
    # Ranks whose newest publication no rank has used.
    unused = set(range(RANKS))
    for phase, lr in PHASES.items():
        for number in range(rounds):
            for rank in rng.sample(range(RANKS), RANKS):
                partner = rng.choice(sorted(unused - {rank}) or [(rank + 1) % RANKS])
                unused = unused - {partner} | {rank}
                step = np.float32(-lr) * gradients.draw()
                for group in groups:
                    group.take_turn(rank, partner, step)
            if number >= rounds // 2:
                for group in groups:
                    group.record_distance(gradients.small)
        yield from _results(distribution, phase, all_settings, groups)
        for group in groups:
            group.reset_statistics()


def _results(
    distribution: str,
    phase: str,
    settings: Sequence[CodecSetting],
    groups: Sequence[_RankGroup],
) -> Iterator[PhaseResult]:
    # RMS distances with the codec none, which comes first, by weight.
    exact: dict[float, np.ndarray] = {}
    for setting, group in zip(settings, groups, strict=True):
        rms = np.sqrt(np.mean(group.square_distances, axis=0))
        ratio, ratio_small = rms / exact.setdefault(setting.weight, rms)
        yield PhaseResult(
            law=distribution,
            phase=phase,
            codec=setting.codec,
            gamma=np.nan if setting.scale_margin is None else setting.scale_margin,
            rho=np.nan if setting.scale_margin is None else setting.scale_decay,
            weight=setting.weight,
            rejected=group.rejected / group.buckets,
            error=float(np.median(np.concatenate(group.errors))),
            disagreement=float(rms[0]),
            apart=float(ratio),
            apart_small=float(ratio_small),
        )
