"""Whether steps that adapt to the delay help decentralized algorithms with a straggler.

Question: does a smaller step for late gradients (`algorithm.delay_adaptive_rule`) help `adpsgd`,
    `swarm` and `dasgd`?
Paper: none for these; the rule is that of Koloskova et al. 2022, theorem 8, for a server.
Setting: 8 ranks, quadratic of 16 dimensions with noise 1, one rank 1, 10 or 100 times slower; a
    gradient of the others takes 0.5 to 1.5 units of time. Rates 0.1 and 0.2 (`dasgd`, where every
    gradient counts in full: 1/8 of these). The delay is the number of gradients that other ranks
    computed meanwhile, tau_C = 8; in `drop 4n` 32, so that it concerns the straggler alone.
Measured: excess loss of the mean of the 7 other ranks' models against time (the straggler's own is
    as old as its last step: before its first it is the start, which no rule changes; the mean of
    all 8 is kept, too); when it stays below epsilon = 1 (0.1 % of the start), its floor (mean over
    the last quarter), its peak after the first quarter, and the share of gradients whose delay is
    above tau_C.
Expected: in a pair average a late gradient moves the mean by eta / n once in a long while: nothing
    to be gained; `dasgd` applies it with the full rate on every replica, as a server does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.studies.dataset import Axis, Dataset, Summary, Variable, measure, seed_axis, spread
from mpi_dasgd.studies.trajectory import (
    configure,
    simulate_trajectory,
    time_until_stays_below,
    vary,
)

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
RANKS = 8
RULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "inverse": {"algorithm.delay_adaptive_rule": "inverse"},
    "capped": {"algorithm.delay_adaptive_rule": "capped"},
    "drop": {"algorithm.delay_adaptive_rule": "drop"},
    "drop 4n": {"algorithm.delay_adaptive_rule": "drop", "algorithm.delay_threshold": 4.0 * RANKS},
}
EPSILON = 1.0
EVERY, MOMENTS = 16, 120


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure the trajectories."""
    gradients = EVERY * (50 if quick else 200)
    base = configure(
        {
            "simulation.ranks": RANKS,
            "simulation.dimension": 16,
            "simulation.noise": 1.0,
            "simulation.slow_ranks": [-1],
            "budget.samples": gradients,
            "transport.inbox_slots": 16,
        }
    )
    moments = np.linspace(0, 0.95 * gradients / RANKS, MOMENTS)

    def point(
        algorithm: str, slowdown: int, rule: str, rate: float, seed: int
    ) -> Mapping[str, Any]:
        run = simulate_trajectory(
            vary(
                base,
                RULES[rule]
                | {
                    "algorithm.name": algorithm,
                    "simulation.slow_factor": slowdown,
                    "optimizer.lr": rate / RANKS if algorithm == "dasgd" else rate,
                    "run.seed": seed,
                },
            ),
            EVERY,
            keep_models=True,
        )
        value = run.problem.value
        excess = np.array([value(x) for x in run.models[:, :-1].mean(1)])
        delays = run.delays
        return {
            "excess": np.exp(np.interp(moments, run.times, np.log(excess))),
            "excess_all": np.exp(np.interp(moments, run.times, np.log(run.excess))),
            "settled": time_until_stays_below(run.times, excess, EPSILON),
            "floor": excess[-len(excess) // 4 :].mean(),
            "peak": excess[len(excess) // 4 :].max(),
            "late": (delays > RANKS).mean() if delays.size else math.nan,
            "delay_max": delays.max() if delays.size else math.nan,
        }

    return measure(
        "adaptive",
        base,
        {
            "algorithm": Axis(["adpsgd", "swarm", "dasgd"], "1", "algorithm.name"),
            "slowdown": Axis(
                [10] if quick else [1, 10, 100], "1", "how many times slower one rank is"
            ),
            "rule": Axis(
                list(RULES)[: 2 if quick else 5], "1", "delay_adaptive_rule; 4n: delay_threshold"
            ),
            "rate": Axis([0.1] if quick else [0.1, 0.2], "1", "rate; dasgd: 1/8 of it"),
            "seed": seed_axis(seeds),
        },
        {
            "excess": Variable("1", "f(mean of the other ranks) - f(optimum)", ("moment",)),
            "excess_all": Variable("1", "f(mean of all ranks) - f(optimum)", ("moment",)),
            "settled": Variable("1", "virtual time until it stays at or below epsilon"),
            "floor": Variable("1", "its mean over the last quarter of the run"),
            "peak": Variable("1", "its largest value after the first quarter of the run"),
            "late": Variable("1", "share of gradients with a delay above tau_C"),
            "delay_max": Variable("gradients", "largest delay"),
        },
        point,
        {"moment": Axis(moments, "1", "virtual time, in units of the mean time of a gradient")},
    )


def summary(samples: Dataset) -> Summary:
    """Return time and floor of each rule, over those of the constant step."""
    middle = {
        name: spread(samples[name])[1] for name in ("settled", "floor", "peak", "late", "delay_max")
    }
    low, _, high = spread(samples["floor"])
    rates = samples["rate"]
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for i, algorithm in enumerate(samples["algorithm"].tolist()):
        for j, slowdown in enumerate(samples["slowdown"].tolist()):
            best = middle["settled"][i, j].argmin(-1)  # rate, for each rule
            for k, rule in enumerate(samples["rule"].tolist()):
                at = i, j, k, best[k]
                row: dict[str, Any] = {"algorithm": algorithm, "slow-down": slowdown, "rule": rule}
                row |= {
                    "delay max": float(middle["delay_max"][at]),
                    "late": float(middle["late"][at]),
                }
                row |= {"best rate": float(rates[best[k]]), "settled": float(middle["settled"][at])}
                row |= {"floor at 0.1": float(middle["floor"][i, j, k, 0])}
                row |= {"from": float(low[i, j, k, 0]), "to": float(high[i, j, k, 0])}
                row |= {"peak at 0.1": float(middle["peak"][i, j, k, 0])}
                rows.append(row)
            these = rows[-len(samples["rule"]) :]
            figures[f"{algorithm}, {slowdown}x"] = {
                row["rule"]: {
                    "time_over_constant": row["settled"] / these[0]["settled"],
                    "floor_over_constant": row["floor at 0.1"] / these[0]["floor at 0.1"],
                    "peak_over_constant": row["peak at 0.1"] / these[0]["peak at 0.1"],
                }
                for row in these[1:]
            }
    return Summary(rows, figures)


def draw(samples: Dataset, path: Path) -> Path:
    """Draw the excess loss against time at the smaller rate, one row per slow-down."""
    from mpi_dasgd.studies import plotting

    names, slow = samples["algorithm"].tolist(), samples["slowdown"].tolist()

    def panels(axes: Any) -> None:
        for j, slowdown in enumerate(slow):
            for i, name in enumerate(names):
                axis = axes[j * len(names) + i]
                for k, rule in enumerate(samples["rule"].tolist()):
                    curve = samples["excess"][i, j, k, 0].T
                    plotting.band(axis, samples["moment"], curve, k, rule, points=False)
                axis.axhline(EPSILON, color="#66717d", lw=0.8, ls=":")
                axis.set(yscale="log", xlabel="time", title=f"{name}, one rank {slowdown}x slower")
                axis.set(ylabel="f(mean of the others) - f(optimum)")
        axes[0].legend(loc="upper right")

    return plotting.draw(path, panels, len(names), len(slow))
