"""Cost of local steps and of few bits for SwarmSGD.

Question: how do accuracy and loss after a fixed number of gradients depend on H and on the bits of
    a parameter?
Paper: Nadiradze et al. 2021, the figures against local steps and the quantized runs.
Setting: `swarm`, 16 ranks, logistic regression on breast_cancer, each rank with its own samples,
    batch 8, constant rate 0.5, 6,400 gradients, float32 models; codecs none (32 bits), lattice16,
    lattice8, lattice4.
Measured: means over the second half of the run: excess loss and accuracy of the mean model, and the
    mean of those of the ranks' own models; share of buckets that were not decoded. (31 parameters
    fill one bucket of 1,024: bytes of a message are not those of a real model.)
Expected: more local steps cost accuracy, less in the mean model than in the ranks' own; 8 bits cost
    less than 0.3 points.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.studies.dataset import Axis, Dataset, Summary, Variable, measure, seed_axis, spread
from mpi_dasgd.studies.trajectory import configure, simulate_trajectory, vary
from mpi_dasgd.tasks.convex import BreastCancer

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 3
RANKS, BATCH = 16, 8
CODECS = {"none": 32, "lattice16": 16, "lattice8": 8, "lattice4": 4}


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure loss and accuracy for each H and codec."""
    gradients = 800 if quick else 6400
    base = configure(
        {
            "task.name": "breast_cancer",
            "task.data": "sharded",
            "task.batch_size": BATCH,
            "algorithm.name": "swarm",
            "simulation.ranks": RANKS,
            "simulation.dtype": "float32",
            "optimizer.lr": 0.5,
            "budget.samples": gradients * BATCH,
        }
    )

    def point(codec: str, steps: int, seed: int) -> Mapping[str, Any]:
        config = vary(base, {"codec.name": codec, "algorithm.local_steps": steps, "run.seed": seed})
        run = simulate_trajectory(config, gradients // 32, keep_models=True)
        problem = run.problem
        assert isinstance(problem, BreastCancer)
        half = len(run.means) // 2
        models = run.models[half:].reshape(-1, run.models.shape[-1])
        least = problem.value(problem.optimum)
        return {
            "excess": run.excess[half:].mean(),
            "accuracy": np.mean([problem.accuracy(x) for x in run.means[half:]]),
            "excess_ranks": np.mean([problem.value(x) for x in models]) - least,
            "accuracy_ranks": np.mean([problem.accuracy(x) for x in models]),
            "spread": run.consensus_distance[half:].mean(),
            "rejected": run.metrics["rejected"],
        }

    return measure(
        "quantization",
        base,
        {
            "codec": Axis(["none", "lattice8"] if quick else list(CODECS), "1", "codec.name"),
            "steps": Axis([1, 8] if quick else [1, 2, 4, 8, 16, 32], "gradients", "H, local steps"),
            "seed": seed_axis(seeds),
        },
        {
            "excess": Variable("1", "f(mean) - f(optimum)"),
            "accuracy": Variable("1", "of the mean model, on all samples"),
            "excess_ranks": Variable("1", "mean_i f(x_i) - f(optimum)"),
            "accuracy_ranks": Variable("1", "mean of the accuracies of all ranks' models"),
            "spread": Variable("1", "mean_i |x_i - mean|^2"),
            "rejected": Variable("1", "share of buckets that were not decoded; NaN: cannot happen"),
        },
        point,
    )


def summary(samples: Dataset) -> Summary:
    """Return all medians, and the cost of fewer bits at each H."""
    middle = {name: np.median(samples[name], -1) for name in samples.arrays}
    codecs, steps = samples["codec"].tolist(), samples["steps"].tolist()
    rows: list[dict[str, Any]] = []
    for j, h in enumerate(steps):
        for i, codec in enumerate(codecs):
            row: dict[str, Any] = {"H": h, "codec": codec, "bits": CODECS[codec]}
            rows.append(row | {name: float(values[i, j]) for name, values in middle.items()})
    points = 100 * middle["accuracy"]
    _, _, largest = spread(samples["excess"][0])
    figures = {
        "points_lost_by_bits": {
            codec: (points[0] - points[i]).tolist() for i, codec in enumerate(codecs) if i
        },
        "excess_over_none": {
            codec: (middle["excess"][i] / middle["excess"][0]).tolist()
            for i, codec in enumerate(codecs)
            if i
        },
        "excess_over_least_H": (middle["excess"][0] / middle["excess"][0, 0]).tolist(),
        "excess_ranks_over_least_H": (
            middle["excess_ranks"][0] / middle["excess_ranks"][0, 0]
        ).tolist(),
        "spread_of_seeds_none": (largest / middle["excess"][0]).tolist(),
    }
    return Summary(rows, figures)


def draw(samples: Dataset, path: Path) -> Path:
    """Draw the excess loss of the mean model and of the ranks' own, and the accuracy, against H."""
    from mpi_dasgd.studies import plotting

    shown = {
        "excess": "Excess loss of the mean model",
        "excess_ranks": "Excess loss of the ranks' models",
        "accuracy_ranks": "Accuracy of the ranks' models",
    }

    def panels(axes: Any) -> None:
        for axis, (name, title) in zip(axes, shown.items(), strict=True):
            for i, codec in enumerate(samples["codec"].tolist()):
                plotting.band(axis, samples["steps"], samples[name][i], i, codec)
            axis.set(xscale="log", xlabel="local steps H", title=title)
            plotting.ticks(axis.xaxis, samples["steps"])
            axis.set(ylabel=samples.variables[name].meaning)
            if name.startswith("excess"):
                axis.set(yscale="log")
            axis.legend(loc="upper left" if name.startswith("excess") else "lower left")

    return plotting.draw(path, panels, 3)
