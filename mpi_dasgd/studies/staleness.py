"""Gradient norm against gradients for replicas of different staleness.

Question: how much does staleness cost, early in a run and late?
Paper: Tosi & Theobald 2023 (DASGD), abstract and experiments.
Setting: `dasgd`, 8 ranks, messages that take 0, 4, 8 or 16 times as long as a gradient; a noisy
    quadratic, and logistic regression on breast_cancer. |grad f|^2 is taken at the mean of the
    replicas.
Expected: the bound is O(sigma / eps^2) + O(Q S_avg / eps^1.5) + O(S_avg / eps): the terms with the
    staleness S decide early, the noise late: curves separate early and merge late.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.studies.dataset import Axis, Dataset, Summary, Variable, measure, seed_axis, spread
from mpi_dasgd.studies.trajectory import configure, simulate_trajectory, vary

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
RANKS = 8
EVERY = 20
PROBLEMS: dict[str, dict[str, Any]] = {
    "quadratic": {
        "simulation.dimension": 32,
        "simulation.noise": 3.0,
        "optimizer.lr": 0.004,
    },
    "breast_cancer": {"optimizer.lr": 0.02, "task.batch_size": 8},
}
EARLY = 600
"""Gradients over which curves are compared early; their floor is that of the last quarter."""


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure the trajectories."""
    gradients = 800 if quick else 6000
    base = configure(
        {"algorithm.name": "dasgd", "simulation.ranks": RANKS, "transport.inbox_slots": 64}
    )

    def point(problem: str, latency: float, seed: int) -> Mapping[str, Any]:
        keys = PROBLEMS[problem]
        run = simulate_trajectory(
            vary(
                base,
                keys
                | {
                    "task.name": problem,
                    "simulation.latency": latency,
                    "budget.samples": gradients * keys.get("task.batch_size", 1),
                    "run.seed": seed,
                },
            ),
            EVERY,
        )
        grad_norm_sq = np.full(gradients // EVERY + 1, np.nan)
        grad_norm_sq[: len(run.counts)] = run.grad_norm_sq / run.grad_norm_sq[0]
        grid = np.arange(len(grad_norm_sq)) * EVERY
        return {
            "slope": grad_norm_sq,
            "spread": np.interp(grid, run.counts, run.consensus_distance),
            "s_avg": run.metrics["set_staleness_mean"],
            "s_max": run.metrics["set_staleness_max"],
        }

    counts = Axis(np.arange(gradients // EVERY + 1) * EVERY, "gradients", "of all ranks")
    return measure(
        "staleness",
        base,
        {
            "problem": Axis(list(PROBLEMS)[: 1 if quick else 2], "1", "task.name"),
            "latency": Axis(
                [0.0, 8.0] if quick else [0.0, 4.0, 8.0, 16.0], "1", "times of a gradient"
            ),
            "seed": seed_axis(seeds),
        },
        {
            "slope": Variable("1", "|grad f(mean)|^2 over that at the start", ("count",)),
            "spread": Variable("1", "mean_i |x_i - mean|^2", ("count",)),
            "s_avg": Variable("gradients", "mean of S(i, j), when a message of j arrives at i"),
            "s_max": Variable("gradients", "largest S(i, j)"),
        },
        point,
        {"count": counts},
    )


def summary(samples: Dataset) -> Summary:
    """Return how far each curve is from that of the least staleness, early and late."""
    grad_norm_sq = spread(samples["slope"], 2)[1]  # (problem, latency, count)
    early, late = int(EARLY / EVERY), grad_norm_sq.shape[-1] * 3 // 4
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for i, problem in enumerate(samples["problem"].tolist()):
        log = np.log(grad_norm_sq[i] / grad_norm_sq[i, 0])
        apart = np.exp(np.abs(log[:, 1:early]).mean(1))
        floors = grad_norm_sq[i][:, late:].mean(1)
        means = np.cumsum(grad_norm_sq[i], 1) / np.arange(1, grad_norm_sq.shape[-1] + 1)
        for j, latency in enumerate(samples["latency"].tolist()):
            row: dict[str, Any] = {"problem": problem, "latency": latency}
            row |= {
                "S_avg": float(np.median(samples["s_avg"][i, j])),
                "S_max": float(np.median(samples["s_max"][i, j])),
                "apart early": float(apart[j]),
                "floor": float(floors[j]),
                "floor / least": float(floors[j] / floors[0]),
                "mean so far, early": float(means[j, early] / means[0, early]),
                "mean so far, end": float(means[j, -1] / means[0, -1]),
            }
            rows.append(row)
        figures[problem] = {
            "s_avg": np.median(samples["s_avg"][i], -1).tolist(),
            "apart_early": apart.tolist(),
            "floor_over_least": (floors / floors[0]).tolist(),
        }
    return Summary(rows, figures)


def draw(samples: Dataset, path: Path) -> Path:
    """Draw one panel per problem."""
    from mpi_dasgd.studies import plotting

    def panels(axes: Any) -> None:
        for i, (axis, problem) in enumerate(zip(axes, samples["problem"].tolist(), strict=True)):
            for j, latency in enumerate(samples["latency"].tolist()):
                stale = np.median(samples["s_avg"][i, j])
                label = f"S_avg {stale:.3g} (latency {latency:g})"
                plotting.band(
                    axis, samples["count"], samples["slope"][i, j].T, j, label, points=False
                )
            axis.set(yscale="log", xlabel="gradients of all ranks", title=problem)
            axis.set(ylabel="|grad f(mean)|^2 / first")
            axis.legend(loc="upper right")

    return plotting.draw(path, panels, len(samples["problem"]))
