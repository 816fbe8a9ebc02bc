"""Where asynchronous SGD ends when data and speeds differ.

Question: how far is the point that `asgd` goes to from the optimum of the mean of all f_i?
Paper: Koloskova et al. 2022, section 5 (Algorithm 2, theorem 10).
Setting: `asgd`, 16 workers with f_i(x) = |x - b_i|^2 / 2, without noise; 4 of them 1, 3 or 10 times
    slower; points go to idle workers (Algorithm 1) or to a worker drawn uniformly (Algorithm 2);
    every step rule.
Expected: the fixed point is sum_i w_i b_i / sum_i w_i, w_i being the sum of the step sizes of
    worker i's gradients. Idle: w_i is the speed. Uniform: all alike, no bias, if the step is
    constant. The rules take from the weight of late workers: their bias has the same form, and
    `drop` leaves slow workers out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.algorithms import ExchangeRecord
from mpi_dasgd.staleness.step_rule import delay_rule
from mpi_dasgd.studies.dataset import Axis, Dataset, Summary, Variable, measure, seed_axis, spread
from mpi_dasgd.studies.trajectory import configure, simulate_trajectory, vary

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
WORKERS, SLOW = 16, 4
RULES = ("constant", "inverse", "capped", "drop")


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure the mean of x over the second half of each run."""
    gradients = 800 if quick else 6000
    base = configure(
        {
            "algorithm.name": "asgd",
            "simulation.ranks": WORKERS + 1,
            "simulation.dimension": 16,
            "simulation.heterogeneity": 1.0,
            "simulation.slow_ranks": [-1 - i for i in range(SLOW)],
            "optimizer.lr": 0.02,
            "budget.samples": gradients,
        }
    )

    def point(clients: str, rule: str, slowdown: int, seed: int) -> Mapping[str, Any]:
        config = vary(
            base,
            {
                "algorithm.client_sampling": clients,
                "algorithm.delay_adaptive_rule": rule,
                "simulation.slow_factor": slowdown,
                "run.seed": seed,
            },
        )
        delays: dict[int, list[int]] = defaultdict(list)  # in the second half of the run, by worker

        def keep_delay(exchange: ExchangeRecord) -> None:
            if 2 * exchange.step >= gradients:
                delays[exchange.partner].append(exchange.step - exchange.partner_step)

        run = simulate_trajectory(config, 5, on_exchange=keep_delay)
        zero, rng = np.zeros(base.simulation.dimension), np.random.default_rng(0)
        minima = -np.array([run.problem.gradient(i, zero, rng) for i in range(1, WORKERS + 1)])
        factor = delay_rule(config.algorithm, WORKERS)
        steps = [sum(map(factor, delays[i])) for i in range(1, WORKERS + 1)]
        speeds = np.where(np.arange(WORKERS) < WORKERS - SLOW, 1.0, 1.0 / slowdown)
        end = run.means[len(run.means) // 2 :].mean(0)
        optimum = minima.mean(0)
        slow = delays[WORKERS]
        return {
            "bias": np.square(end - optimum).sum(),
            "by_steps": np.square(np.average(minima, 0, steps) - optimum).sum(),
            "by_speeds": np.square(np.average(minima, 0, speeds) - optimum).sum(),
            "weight": sum(steps[-SLOW:]) / sum(steps),
            "delay_slow": np.mean(slow) if slow else None,
            "delay_fast": np.mean(delays[1]),
        }

    return measure(
        "heterogeneous",
        base,
        {
            "clients": Axis(["idle", "uniform"], "1", "algorithm.client_sampling"),
            "rule": Axis(RULES[:2] if quick else RULES, "1", "algorithm.delay_adaptive_rule"),
            "slowdown": Axis(
                [10] if quick else [1, 3, 10], "1", "how many times slower 4 of 16 workers are"
            ),
            "seed": seed_axis(seeds),
        },
        {
            "bias": Variable(
                "1", "|x - optimum|^2, x being the mean over the second half of the run"
            ),
            "by_steps": Variable(
                "1", "the same of the mean of all b_i, weighed with the steps of each"
            ),
            "by_speeds": Variable("1", "the same of the mean of all b_i, weighed with the speeds"),
            "weight": Variable(
                "1", "share of the slow workers in the sum of all steps; 0.25 is fair"
            ),
            "delay_slow": Variable("gradients", "mean delay of the last, slow worker"),
            "delay_fast": Variable("gradients", "mean delay of the first, fast worker"),
        },
        point,
    )


def summary(samples: Dataset) -> Summary:
    """Return the bias, measured and in closed form."""
    middle = {name: spread(samples[name])[1] for name in samples.arrays}
    rows: list[dict[str, Any]] = []
    for i, clients in enumerate(_clients(samples)):
        for j, rule in enumerate(samples["rule"].tolist()):
            for k, slowdown in enumerate(samples["slowdown"].tolist()):
                row: dict[str, Any] = {"clients": clients, "rule": rule, "slow-down": slowdown}
                row |= {name: float(values[i, j, k]) for name, values in middle.items()}
                rows.append(row)
    last = {(r["clients"], r["rule"]): r for r in rows}
    free, fair = last["idle", "constant"], last["uniform", "constant"]
    figures = {
        "bias_free_constant_over_speeds": free["bias"] / free["by_speeds"],
        "bias_uniform_over_free_constant": fair["bias"] / free["bias"],
        "bias_over_by_steps": {
            f"{c}, {r}": row["bias"] / row["by_steps"] for (c, r), row in last.items()
        },
        "weight_of_slow": {f"{c}, {r}": row["weight"] for (c, r), row in last.items()},
    }
    return Summary(rows, figures)


def _clients(samples: Dataset) -> list[str]:
    """Return the values of `algorithm.client_sampling`; files of before call `idle` `free`."""
    return ["idle" if name == "free" else name for name in samples["clients"].tolist()]


def draw(samples: Dataset, path: Path) -> Path:
    """Draw the bias against the slow-down, one panel per way to choose clients."""
    from mpi_dasgd.studies import plotting

    def panels(axes: Any) -> None:
        k = samples["slowdown"]
        for i, (axis, clients) in enumerate(zip(axes, _clients(samples), strict=True)):
            for j, rule in enumerate(samples["rule"].tolist()):
                plotting.band(axis, k, samples["bias"][i, j], j, rule)
                closed = spread(samples["by_steps"])[1][i, j]
                plotting.theory(axis, k, closed, "sum w_i b_i / sum w_i" if j == 0 else "")
            axis.set(xscale="log", yscale="log", xlabel="slow-down of 4 of 16 workers")
            title = "an idle worker" if clients == "idle" else "drawn uniformly"
            axis.set(ylabel="|x - optimum|^2", title=f"Next point to: {title}")
            plotting.ticks(axis.xaxis, k)
            axis.legend(loc="upper left")

    return plotting.draw(path, panels, 2)
