"""Throughput when one of 16 workers is slow.

Question: how many gradients per unit of time do the algorithms make when one worker takes k times
    as long?
Paper: Lian et al. 2018 (AD-PSGD), the figure with one slow worker.
Setting: 16 workers (an algorithm with a server has a 17th rank), no latency; a gradient takes 1
    unit of time, exactly (`constant`) or 0.5 to 1.5 at random (`uniform`); one worker is slowed 1,
    2, 10, 100 times.
Expected: synchronous n / k; asynchronous n - 1 + 1 / k. With random times synchronous ranks also
    wait for the slowest of n draws in every step, which the line n / k leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd import algorithms
from mpi_dasgd.studies.dataset import Axis, Dataset, Summary, Variable, measure, seed_axis
from mpi_dasgd.studies.trajectory import configure, simulate_trajectory, vary

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
WORKERS = 16
SYNCHRONOUS = ("allreduce", "local_sgd", "dpsgd", "sgp", "minibatch")
ASYNCHRONOUS = ("adpsgd", "swarm", "dasgd", "asgd", "osgp", "easgd")
SERVERS = ("asgd", "minibatch", "easgd")
GRADIENTS = {1: 800, 2: 800, 10: 1600, 100: 3200}
"""Gradients of a run by slow-down: at least 2 of the slow worker; synchronous ones make 800."""


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure the virtual time of a number of gradients."""
    base = configure(
        {"simulation.dimension": 4, "optimizer.lr": 0.01, "simulation.slow_ranks": [-1]}
    )

    def point(algorithm: str, compute: str, slowdown: int, seed: int) -> Mapping[str, Any]:
        gradients = 640 if quick else GRADIENTS[slowdown]
        if algorithm in SYNCHRONOUS:
            gradients = min(gradients, 800)
        run = simulate_trajectory(
            vary(
                base,
                {
                    "algorithm.name": algorithm,
                    "simulation.ranks": WORKERS + (algorithm in SERVERS),
                    "simulation.compute_time": compute,
                    "simulation.slow_factor": slowdown,
                    "budget.samples": gradients,
                    "run.seed": seed,
                },
            ),
            gradients,
        )
        return {"gradients": run.counts[-1], "time": run.times[-1]}

    names = [name for name in (*SYNCHRONOUS, *ASYNCHRONOUS) if name in algorithms.ALGORITHMS]
    return measure(
        "slowdown",
        base,
        {
            "algorithm": Axis(names, "1", "algorithm.name"),
            "compute": Axis(
                ["constant"] if quick else ["constant", "uniform"], "1", "times of a gradient"
            ),
            "slowdown": Axis(
                [1, 10] if quick else [1, 2, 10, 100], "1", "how many times slower one worker is"
            ),
            "seed": seed_axis(seeds),
        },
        {
            "gradients": Variable("gradients", "computed by all workers"),
            "time": Variable("1", "virtual time, in units of the mean time of a gradient"),
        },
        point,
    )


def theory(algorithm: str, slowdown: np.ndarray) -> np.ndarray:
    """Return the gradients per unit of time that follow from the paper's reasoning."""
    if algorithm in SYNCHRONOUS:
        return WORKERS / slowdown
    return WORKERS - 1 + 1 / slowdown


def summary(samples: Dataset) -> Summary:
    """Return the throughput by algorithm and slow-down, and its ratio to theory."""
    rate = np.median(samples["gradients"] / samples["time"], axis=-1)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, list[float]]] = {}
    for i, algorithm in enumerate(samples["algorithm"].tolist()):
        expected = theory(algorithm, samples["slowdown"])
        for j, compute in enumerate(samples["compute"].tolist()):
            ratios.setdefault(compute, {})[algorithm] = (rate[i, j] / expected).tolist()
            row: dict[str, Any] = {"algorithm": algorithm, "times": compute}
            rows.append(
                row | {f"{k}x": r for k, r in zip(samples["slowdown"], rate[i, j], strict=True)}
            )
    exact = ratios["constant"].values()
    off = max(abs(ratio - 1) for values in exact for ratio in values)
    return Summary(rows, {"over_theory": ratios, "largest_deviation_constant_times": off})


def draw(samples: Dataset, path: Path) -> Path:
    """Draw one panel per distribution of the times."""
    from mpi_dasgd.studies import plotting

    def panels(axes: Any) -> None:
        for j, (axis, compute) in enumerate(zip(axes, samples["compute"].tolist(), strict=True)):
            k = samples["slowdown"]
            for i, algorithm in enumerate(samples["algorithm"].tolist()):
                rate = (samples["gradients"] / samples["time"])[i, j]
                plotting.band(axis, k, rate, i, algorithm)
            fine = np.geomspace(k[0], k[-1], 100)
            plotting.theory(axis, fine, WORKERS / fine, "n / k and n - 1 + 1 / k")
            plotting.theory(axis, fine, WORKERS - 1 + 1 / fine, "")
            axis.set(xscale="log", yscale="log", xlabel="slow-down of one of 16 workers")
            axis.set(ylabel="gradients per unit of time", title=f"{compute} times")
            plotting.ticks(axis.xaxis, k)
            plotting.ticks(axis.yaxis, np.array([0.2, 0.5, 1, 2, 5, 10, 15]))
        axes[0].legend(loc="lower left", ncols=2, fontsize=7)

    return plotting.draw(path, panels, len(samples["compute"]))
