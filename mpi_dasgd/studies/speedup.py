"""Linear speed-up with the number of ranks, where noise decides.

Question: how much sooner do n ranks reach a given accuracy than one?
Paper: Lian et al. 2018, Nadiradze et al. 2021: the rates do not contain n: n ranks need 1/n of the
    time.
Setting: quadratic of 32 dimensions, noise of standard deviation 10 per coordinate, every rank alike
    and without latency. One gradient moves the mean by eta / n, so that its noise floor is eta
    sigma^2 d / (2 n): what one rank reaches with eta_1, n ranks reach with n eta_1 in 1/n of the
    time. So eta = c n epsilon / (sigma^2 d), which puts the floor at c epsilon / 2: c = 1, and the
    best c for each n. `alone` is the run with n = 1.
Expected: |mean - optimum|^2 is epsilon after ln(100 d / (epsilon - floor)) / (2 eta), which is like
    1/n, until eta nears 1: the consensus distance adds to the noise there, and the step is no
    longer small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd import algorithms
from mpi_dasgd.studies.dataset import (
    Axis,
    Dataset,
    Summary,
    Variable,
    loglog_slope,
    measure,
    seed_axis,
    spread,
)
from mpi_dasgd.studies.trajectory import configure, first_time_below, simulate_trajectory, vary

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
DIMENSION, NOISE = 32, 10.0
EPSILON = 3.2
FACTORS = (1.0, 1.4, 2.0)


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure the time to epsilon for every n and factor c."""
    base = configure({"simulation.dimension": DIMENSION, "simulation.noise": NOISE})
    names = [name for name in ("adpsgd", "swarm") if name in algorithms.ALGORITHMS]

    def point(algorithm: str, ranks: int, factor: float, seed: int) -> Mapping[str, Any]:
        rate = factor * ranks * EPSILON / (NOISE**2 * DIMENSION)
        every = max(8, ranks // 4)
        needed = ranks * math.log(100 * DIMENSION / EPSILON) / (2 * rate)
        run = simulate_trajectory(
            vary(
                base,
                {
                    "algorithm.name": "alone" if ranks == 1 else algorithm,
                    "simulation.ranks": ranks,
                    "optimizer.lr": rate,
                    "budget.samples": every * math.ceil(2 * needed / every),
                    "run.seed": seed,
                },
            ),
            every,
            until=EPSILON,
        )
        return {
            "rate": rate,
            "time": first_time_below(run.times, run.distances, EPSILON),
            "gradients": first_time_below(run.counts, run.distances, EPSILON),
        }

    ranks = [1, 16] if quick else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    return measure(
        "speedup",
        base,
        {
            "algorithm": Axis(
                names[:1] if quick else names, "1", "algorithm.name; with 1 rank `alone`"
            ),
            "ranks": Axis(ranks, "1", "n"),
            "factor": Axis(
                FACTORS[1:2] if quick else FACTORS, "1", "c: the rate is c n epsilon / (sigma^2 d)"
            ),
            "seed": seed_axis(seeds),
        },
        {
            "rate": Variable("1", "optimizer.lr"),
            "time": Variable(
                "1", "virtual time to epsilon, in units of the time of a gradient; NaN: never"
            ),
            "gradients": Variable("gradients", "of all ranks to epsilon"),
        },
        point,
    )


def _fixed(samples: Dataset) -> np.ndarray:
    """Return the times with c = 1, or the only c there is, (algorithm, ranks, seed)."""
    factors = samples["factor"].tolist()
    return samples["time"][:, :, factors.index(1.0) if 1.0 in factors else 0]


def _best(samples: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the times with the best c, (algorithm, ranks, seed), and that c."""
    choice = spread(samples["time"])[1].argmin(-1)
    times = np.take_along_axis(samples["time"], choice[..., None, None], 2)[:, :, 0]
    return times, samples["factor"][choice]


def theory(ranks: np.ndarray) -> np.ndarray:
    """Return the time to epsilon with c = 1, if only noise and small steps move the mean."""
    rate = ranks * EPSILON / (NOISE**2 * DIMENSION)
    return np.log(100 * DIMENSION / (EPSILON / 2)) / (2 * rate)


def summary(samples: Dataset) -> Summary:
    """Return times with c = 1 and the best c, the speed-up, and the exponent of the time in n."""
    tuned, factors = _best(samples)
    fixed = spread(_fixed(samples))[1]
    least, middle, largest = spread(tuned)
    ranks = samples["ranks"]
    expected = theory(ranks)
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"exponent_of_theory": -1.0}
    for i, algorithm in enumerate(samples["algorithm"].tolist()):
        gain = middle[i, 0] / middle[i]
        for j, n in enumerate(ranks.tolist()):
            row: dict[str, Any] = {"algorithm": algorithm, "ranks": n, "time, c = 1": fixed[i, j]}
            row |= {"over theory": fixed[i, j] / expected[j], "best c": factors[i, j]}
            row |= {"its time": middle[i, j], "from": least[i, j], "to": largest[i, j]}
            rows.append(row | {"speed-up": gain[j], "efficiency": gain[j] / n})
        figures[algorithm] = {
            "exponent_of_time_c_1": loglog_slope(ranks, fixed[i]),
            "speedup_at_most_ranks_c_1": fixed[i, 0] / fixed[i, -1],
            "time_over_theory_c_1": (fixed[i] / expected).tolist(),
            "exponent_of_time_tuned": loglog_slope(ranks, middle[i]),
            "speedup_at_most_ranks_tuned": gain[-1],
            "efficiency_tuned": (gain / ranks).tolist(),
        }
    return Summary(rows, figures)


def draw(samples: Dataset, path: Path) -> Path:
    """Draw the time to epsilon with c = 1, and the speed-up with the best c."""
    from mpi_dasgd.studies import plotting

    fixed, (tuned, _) = _fixed(samples), _best(samples)
    ranks = samples["ranks"]

    def panels(axes: Any) -> None:
        for i, algorithm in enumerate(samples["algorithm"].tolist()):
            one = spread(tuned)[1][i, 0]
            plotting.band(axes[0], ranks, fixed[i], i, algorithm)
            plotting.band(axes[1], ranks, one / tuned[i], i, algorithm)
        plotting.theory(axes[0], ranks, theory(ranks), "theory, ~ 1 / n")
        plotting.theory(axes[1], ranks, ranks, "n")
        axes[0].set(ylabel="units of time", title="Time to epsilon, noise floor at epsilon / 2")
        axes[1].set(ylabel="time of one rank / time", title="Speed-up, rate tuned for each n")
        for axis, place in zip(axes, ("upper right", "upper left"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="ranks n")
            plotting.ticks(axis.xaxis, ranks)
            axis.legend(loc=place)

    return plotting.draw(path, panels, 2)
