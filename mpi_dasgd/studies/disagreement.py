"""Consensus distance of SwarmSGD.

Question: how does the consensus distance depend on the rate, the local steps H, and the graph?
Paper: Nadiradze et al. 2021, the bound on the potential: per node eta^2 H^2 (r / lambda_2)^2 M^2.
Setting: `swarm`, 32 ranks on r-regular graphs, codec `none`; f_i(x) = |x - b_i|^2 / 2 in 8
    dimensions. `noise`: all b_i alike, gradient noise of standard deviation 100 per coordinate,
    which local steps add up at random. `drift`: no noise, b_i of spread 100, which local steps add
    up in a straight line: H times as much.
Expected: the bound's exponents are 2, 2, 2; it holds for all gradients of second moment M^2. A
    linear analysis (`linear_theory.py`), S being the consensus distance by unit noise on this
    graph, says per node
        noise: eta^2 H sigma^2 d (S + (H - 1) / (2 H)): the last is what is not averaged yet
        drift: |c + eta (H - 1) / 2 (b - c)|^2 + eta^2 H^2 |b - c|^2 S
            with c = eta H (L / r + eta H)^-1 b
    so that noise has the exponents 2, 1, less than 1; drift 2, 2, less than 2, and less where the
    pull eta H of the minima is not small beside the mixing lambda_2 / r.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpi_dasgd.studies import linear_theory
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
from mpi_dasgd.studies.trajectory import configure, simulate_trajectory, vary

__all__ = ["SEEDS", "draw", "samples", "summary"]

SEEDS = 2
RANKS, DIMENSION, STRENGTH = 32, 8, 100.0
RATES = (2.5e-4, 5e-4, 1e-3)
MIDDLE = 5e-4
"""The rate at which H and the graph are varied."""
MIDDLE_H = 4
"""H at which the rate is varied."""
PHASES = {"complete": 100, "random_regular": 120, "torus": 160, "ring": 320}
"""Local phases of each rank, by graph: the second half is averaged; a ring forgets in some 52."""


def samples(seeds: int, quick: bool) -> Dataset:
    """Measure the consensus distance, as the mean over the second half of each run."""
    base = configure(
        {
            "algorithm.name": "swarm",
            "simulation.ranks": RANKS,
            "simulation.dimension": DIMENSION,
        }
    )

    def point(kind: str, graph: str, rate: float, steps: int, seed: int) -> Mapping[str, Any]:
        if rate != MIDDLE and steps != MIDDLE_H:
            return {}
        phases = PHASES[graph] // (4 if quick else 1)
        gradients = phases * steps * RANKS
        run = simulate_trajectory(
            vary(
                base,
                {
                    "topology.graph": graph,
                    "topology.degree": 4 if graph == "random_regular" else None,
                    "simulation.noise": STRENGTH if kind == "noise" else 0.0,
                    "simulation.heterogeneity": STRENGTH if kind == "drift" else 0.0,
                    "algorithm.local_steps": steps,
                    "optimizer.lr": rate,
                    "budget.samples": gradients,
                    "run.seed": seed,
                },
            ),
            gradients // phases,
        )
        zero, rng = np.zeros(DIMENSION), np.random.default_rng(0)
        minima = np.zeros((RANKS, DIMENSION))
        if kind == "drift":
            minima -= [run.problem.gradient(i, zero, rng) for i in range(RANKS)]
        return {
            "disagreement": run.consensus_distance[len(run.consensus_distance) // 2 :].mean(),
            "predicted": predict(graph, rate, steps, seed, minima),
            "relaxation": linear_theory.relaxations(_laplacian(graph, seed)).max(),
        }

    graphs = ["complete"] if quick else list(PHASES)
    return measure(
        "disagreement",
        base,
        {
            "kind": Axis(["noise", "drift"], "1", "what drives the models apart"),
            "graph": Axis(graphs, "1", "topology.graph"),
            "rate": Axis([MIDDLE] if quick else RATES, "1", "eta, optimizer.lr"),
            "steps": Axis(
                [1, 4] if quick else [1, 2, 4, 8], "gradients", "H, algorithm.local_steps"
            ),
            "seed": seed_axis(seeds),
        },
        {
            "disagreement": Variable("1", "mean_i |x_i - mean|^2, the mean over the second half"),
            "predicted": Variable("1", "the same by a linear analysis"),
            "relaxation": Variable("1", "r / lambda_2"),
        },
        point,
    )


def _laplacian(graph: str, seed: int) -> np.ndarray:
    return linear_theory.laplacian(graph, RANKS, 4 if graph == "random_regular" else None, seed)


def predict(graph: str, rate: float, steps: int, seed: int, minima: np.ndarray) -> float:
    """Return the consensus distance by the linear analysis.

    Args:
        graph: name of the graph.
        rate: eta.
        steps: H.
        seed: seed of the graph.
        minima: b_i, (n, d), for the drift; all zero for the noise.
    """
    laplacian = _laplacian(graph, seed)
    unit_distance = linear_theory.noise(laplacian)
    if not minima.any():
        variance = rate**2 * steps * STRENGTH**2 * DIMENSION
        return variance * (unit_distance + (steps - 1) / (2 * steps) * (1 - 1 / RANKS))
    models, pull = linear_theory.drift(laplacian, rate * steps, minima)
    after_local_steps = models + rate * (steps - 1) / 2 * pull
    return float(
        np.square(after_local_steps).sum(1).mean()
        + np.square(rate * steps * pull).sum(1).mean() * unit_distance
    )


def summary(samples: Dataset) -> Summary:
    """Return measured over predicted values, and the exponents in eta, H and r / lambda_2."""
    middle = {name: spread(samples[name])[1] for name in samples.arrays}
    graphs, rates, steps = (samples[name].tolist() for name in ("graph", "rate", "steps"))
    rate, step = rates.index(MIDDLE), steps.index(MIDDLE_H)
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"theory": {"eta": 2, "H": 2, "r / lambda_2": 2}}
    for i, kind in enumerate(samples["kind"].tolist()):
        value, predicted = middle["disagreement"][i], middle["predicted"][i]
        relaxation = middle["relaxation"][i, :, rate, step]
        for j, graph in enumerate(graphs):
            row: dict[str, Any] = {"kind": kind, "graph": graph, "r/lambda_2": float(relaxation[j])}
            row |= {f"H={h}": float(value[j, rate, k]) for k, h in enumerate(steps)}
            row |= {f"eta={r:g}": float(value[j, k, step]) for k, r in enumerate(rates)}
            row["H=4 / predicted"] = float(value[j, rate, step] / predicted[j, rate, step])
            rows.append(row)
        figures[kind] = {
            "eta": {g: loglog_slope(rates, value[j, :, step]) for j, g in enumerate(graphs)},
            "H": {g: loglog_slope(steps, value[j, rate]) for j, g in enumerate(graphs)},
            "r / lambda_2": loglog_slope(relaxation, value[:, rate, step]),
            "r / lambda_2 as predicted": loglog_slope(relaxation, predicted[:, rate, step]),
        }
    return Summary(rows, figures)


def draw(samples: Dataset, path: Path) -> Path:
    """Draw the consensus distance against H, eta and r / lambda_2, one row per kind."""
    from mpi_dasgd.studies import plotting

    rates, steps = samples["rate"], samples["steps"]
    rate, step = rates.tolist().index(MIDDLE), steps.tolist().index(MIDDLE_H)
    relaxation = spread(samples["relaxation"])[1]

    def panels(axes: Any) -> None:
        for i, kind in enumerate(samples["kind"].tolist()):
            value = samples["disagreement"][i]
            row = axes[3 * i : 3 * i + 3]
            for j, graph in enumerate(samples["graph"].tolist()):
                plotting.band(row[0], steps, value[j, rate], j, graph)
                plotting.band(row[1], rates, value[j, :, step], j, graph)
                place = relaxation[i, j, rate, step, None]
                plotting.band(row[2], place, value[j, rate, step, None], j, graph)
            first = value[0, rate, step].mean()
            plotting.theory(row[0], steps, first * (steps / MIDDLE_H) ** 2, "~ H^2")
            plotting.theory(row[1], rates, first * (rates / MIDDLE) ** 2, "~ eta^2")
            x = relaxation[i, :, rate, step]
            plotting.theory(row[2], x, first * (x / x[0]) ** 2, "~ (r / lambda_2)^2")
            predicted = spread(samples["predicted"])[1][i, :, rate, step]
            row[2].plot(x, predicted, "x", color="#66717d", label="linear analysis")
            names = f"H, eta = {MIDDLE:g}", f"eta, H = {MIDDLE_H}", "r / lambda_2"
            for axis, name in zip(row, names, strict=True):
                axis.set(xscale="log", yscale="log", xlabel=name, title=f"{kind}")
                axis.set(ylabel="mean |x_i - mean|^2")
                axis.legend(loc="upper left", fontsize=7)
            plotting.ticks(row[0].xaxis, steps)
            plotting.ticks(row[1].xaxis, rates)

    return plotting.draw(path, panels, 3, 2)
