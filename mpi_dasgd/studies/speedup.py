"""Linear speed-up with the number of ranks, where noise decides.

Question: how much sooner do n ranks reach a given accuracy than one?
Paper: Lian et al. 2018, Nadiradze et al. 2021: the rates do not contain n: n ranks need 1/n of the time.
Setting: quadratic of 32 dimensions, noise of standard deviation 10 a coordinate, every rank alike and
    without latency. One gradient moves the mean by eta / n, so that its noise floor is eta sigma^2 d / (2
    n): what one rank reaches with eta_1, n ranks reach with n eta_1 in 1/n of the time. So eta is chosen
    for each n, the best of c n epsilon / (sigma^2 d) for some c; `alone` is the run with n = 1.
Expected: the time to |mean - optimum|^2 <= epsilon falls like 1/n, until n eta_1 nears 1: the disagreement
    of the models adds to the noise there, and the step is no longer small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd import algorithms
from mpi_dasgd.studies.course import Course, configure, reached, vary
from mpi_dasgd.studies.samples import (
    Axis,
    Samples,
    Summary,
    Variable,
    exponent,
    measure,
    spread,
)  # fmt: skip

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
DIMENSION, NOISE = 32, 10.0
EPSILON = 3.2
FACTORS = (1.0, 1.4, 2.0)


def samples(seeds: int, quick: bool) -> Samples:
    """Measure the time to epsilon for every n and factor c."""
    base = configure({"simulation.dimension": DIMENSION, "simulation.noise": NOISE})
    names = [name for name in ("adpsgd", "swarm") if name in algorithms.ALGORITHMS]

    def point(algorithm: str, ranks: int, factor: float, seed: int) -> Mapping[str, Any]:
        rate = factor * ranks * EPSILON / (NOISE**2 * DIMENSION)
        every = max(8, ranks // 4)
        needed = ranks * math.log(100 * DIMENSION / EPSILON) / (2 * rate)
        run = Course(
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
            "time": reached(run.times, run.distances, EPSILON),
            "gradients": reached(run.counts, run.distances, EPSILON),
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
            "seed": Axis(list(range(1, seeds + 1)), "1", "run.seed"),
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


def _best(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Return the times with the best factor, (algorithm, ranks, seed), and that factor."""
    choice = spread(samples["time"])[1].argmin(-1)
    times = np.take_along_axis(samples["time"], choice[..., None, None], 2)[:, :, 0]
    return times, samples["factor"][choice]


def summary(samples: Samples) -> Summary:
    """Speed-up over one rank, and the exponent of the time in n."""
    times, factors = _best(samples)
    least, middle, largest = spread(times)
    ranks = samples["ranks"]
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for i, algorithm in enumerate(samples["algorithm"].tolist()):
        gain = middle[i, 0] / middle[i]
        for j, n in enumerate(ranks.tolist()):
            rows.append(
                {
                    "algorithm": algorithm,
                    "ranks": n,
                    "c": factors[i, j],
                    "time": middle[i, j],
                    "from": least[i, j],
                    "to": largest[i, j],
                    "speed-up": gain[j],
                    "efficiency": gain[j] / n,
                }
            )
        figures[algorithm] = {
            "exponent_of_time": exponent(ranks, middle[i]),
            "exponent_of_theory": -1.0,
            "speedup_at_most_ranks": gain[-1],
            "efficiency": (gain / ranks).tolist(),
        }
    return Summary(rows, figures)


def draw(samples: Samples, path: Path) -> Path:
    """Time to epsilon, and speed-up."""
    from mpi_dasgd.studies import figure

    times, _ = _best(samples)
    ranks = samples["ranks"]

    def panels(axes: Any) -> None:
        one = spread(times)[1][:, 0]
        for i, algorithm in enumerate(samples["algorithm"].tolist()):
            figure.band(axes[0], ranks, times[i], i, algorithm)
            figure.band(axes[1], ranks, one[i] / times[i], i, algorithm)
        figure.theory(axes[0], ranks, one[0] / ranks, "1 / n")
        figure.theory(axes[1], ranks, ranks, "n")
        axes[0].set(ylabel="units of time", title="Time to epsilon, rate tuned for each n")
        axes[1].set(ylabel="time of one rank / time", title="Speed-up")
        for axis in axes:
            axis.set(xscale="log", yscale="log", xlabel="ranks n")
            figure.ticks(axis.xaxis, ranks)
            axis.legend(loc="upper left")

    return figure.draw(path, panels, 2)
