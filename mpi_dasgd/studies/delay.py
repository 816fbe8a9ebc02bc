"""Gradients to a given accuracy against the largest delay, at a fixed number of workers.

Question: does one very late worker slow asynchronous SGD down?
Paper: Koloskova et al. 2022, theorems 6 and 8.
Setting: `asgd`, 8 workers, noise-free quadratic with L = 1, one worker 1 to 300 times slower, so
    that the concurrency stays tau_C = 8 while tau_max grows. Times of a gradient are 0.5 to 1.5 at
    random.
Measured: `average`: gradients T until the mean of |grad f|^2 over all iterates is 5 % of its first
    value, as in the theorems, with the rate that they allow, 1 / (2 L sqrt(tau_C tau_max)) for the
    constant step and 1 / (2 L tau_C) for the rules, and with the best rate of a grid. `settled`:
    gradients until |grad f|^2 stays below 1e-6 of its first value, with the best rate; `reached`:
    until it is there for the first time.
Expected: with the rate that it is allowed the constant step needs T ~ sqrt(tau_max); with the rules
    T does not depend on tau_max. Theorem 6 holds for the worst schedule: with tuned rates `average`
    need not grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
from mpi_dasgd.studies.trajectory import (
    configure,
    first_time_below,
    simulate_trajectory,
    time_until_stays_below,
    vary,
)

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
WORKERS = 8
RULES = ("constant", "inverse", "capped", "drop")
RATES = (0.0, 0.01, 0.02, 0.04, 0.08)  # 0 stands for the theorems' own
AVERAGE, LEVEL = 0.05, 1e-6


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure gradients to accuracy for each rule, slow-down and rate."""
    base = configure(
        {
            "algorithm.name": "asgd",
            "simulation.ranks": WORKERS + 1,
            "simulation.dimension": 8,
            "simulation.slow_ranks": [-1],
        }
    )

    def point(rule: str, slowdown: int, rate: float, seed: int) -> Mapping[str, Any]:
        tau_max = 1.5 * (WORKERS - 1) * slowdown
        allowed = (
            1 / (2 * math.sqrt(WORKERS * tau_max)) if rule == "constant" else 1 / (2 * WORKERS)
        )
        gradients = 10 * math.ceil(
            max(60 if quick else 150, 0.3 * tau_max, 1.3 / (2 * AVERAGE * allowed) / 10)
        )
        run = simulate_trajectory(
            vary(
                base,
                {
                    "algorithm.delay_adaptive_rule": rule,
                    "simulation.slow_factor": slowdown,
                    "optimizer.lr": rate or allowed,
                    "budget.samples": gradients,
                    "run.seed": seed,
                },
            ),
            10,
        )
        relative = run.grad_norm_sq / run.grad_norm_sq[0]
        average = np.cumsum(relative) / np.arange(1, len(relative) + 1)
        return {
            "tau_max": run.metrics["server_delay_max"],
            "tau_avg": run.metrics["server_delay_average"],
            "rate_used": rate or allowed,
            "average": time_until_stays_below(run.counts, average, AVERAGE),
            "settled": time_until_stays_below(run.counts, relative, LEVEL),
            "reached": first_time_below(run.counts, relative, LEVEL),
        }

    return measure(
        "delay",
        base,
        {
            "rule": Axis(RULES[:2] if quick else RULES, "1", "algorithm.delay_adaptive_rule"),
            "slowdown": Axis(
                [1, 30] if quick else [1, 3, 10, 30, 100, 300],
                "1",
                "how many times slower one worker is",
            ),
            "rate": Axis(
                RATES[:1] + RATES[2:3] if quick else RATES, "1", "optimizer.lr; 0: the theorems'"
            ),
            "seed": seed_axis(seeds),
        },
        {
            "tau_max": Variable("gradients", "largest delay, gradients in flight included"),
            "tau_avg": Variable("gradients", "average delay, gradients in flight included"),
            "rate_used": Variable("1", "optimizer.lr"),
            "average": Variable("gradients", "until the mean of |grad f|^2 is 5 % of the first"),
            "settled": Variable("gradients", "until |grad f|^2 stays below 1e-6 of the first"),
            "reached": Variable("gradients", "until |grad f|^2 is below 1e-6 of the first, once"),
        },
        point,
    )


def _tuned(samples: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return gradients with the best rate of the grid, (rule, slowdown, seed), and that rate."""
    values = samples[name][:, :, 1:]
    choice = spread(values)[1].argmin(-1)
    best = np.take_along_axis(values, choice[..., None, None], 2)[:, :, 0]
    return best, samples["rate"][1:][choice]


def _curves(samples: Dataset) -> dict[str, np.ndarray]:
    """Return gradients by criterion, (rule, slowdown, seed)."""
    return {
        "average, rate of the theorems": samples["average"][:, :, 0],
        "average, rate tuned": _tuned(samples, "average")[0],
        "settled, rate tuned": _tuned(samples, "settled")[0],
        "reached, rate tuned": _tuned(samples, "reached")[0],
    }


def _largest_delay(samples: Dataset) -> np.ndarray:
    return np.median(samples["tau_max"], axis=(0, 2, 3))


def summary(samples: Dataset) -> Summary:
    """Return the gradients for each rule and slow-down, and their exponents in tau_max."""
    tau_max = _largest_delay(samples)
    curves = _curves(samples)
    rates = _tuned(samples, "settled")[1]
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"tau_max": tau_max.tolist()}
    figures["tau_avg"] = np.median(samples["tau_avg"], axis=(0, 2, 3)).tolist()
    for i, rule in enumerate(samples["rule"].tolist()):
        for j, k in enumerate(samples["slowdown"].tolist()):
            row: dict[str, Any] = {"rule": rule, "slow-down": k, "tau_max": int(tau_max[j])}
            row |= {name: float(spread(c)[1][i, j]) for name, c in curves.items()}
            rows.append(row | {"its rate": float(rates[i, j])})
        figures[rule] = {
            f"exponent in tau_max: {name}": loglog_slope(tau_max, spread(c)[1][i])
            for name, c in curves.items()
        }
    figures["theory"] = {"constant": 0.5, "rules": 0.0}
    return Summary(rows, figures)


def draw(samples: Dataset, path: Path) -> Path:
    """Draw one panel for each criterion but `reached`."""
    from mpi_dasgd.studies import plotting

    tau_max = _largest_delay(samples)
    curves = list(_curves(samples).items())[:3]

    def panels(axes: Any) -> None:
        for axis, (name, curve) in zip(axes, curves, strict=True):
            for i, rule in enumerate(samples["rule"].tolist()):
                plotting.band(axis, tau_max, curve[i], i, rule)
            first = float(spread(curve)[1][0, 0])
            plotting.theory(axis, tau_max, first * np.sqrt(tau_max / tau_max[0]), "~ sqrt(tau_max)")
            axis.set(xscale="log", yscale="log", xlabel="largest delay tau_max, in gradients")
            axis.set(ylabel="gradients", title=name)
            axis.legend(loc="upper left")

    return plotting.draw(path, panels, 3)
