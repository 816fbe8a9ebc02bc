"""Metrics of a simulation: what its driver counts, and what `simulate --json` prints."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from mpi_dasgd.algorithms.records import ABSORBED, APPLIED, INITIATED, SKIPPED, ExchangeRecord
from mpi_dasgd.simulation.conservation import total_mass
from mpi_dasgd.storage.json_values import json_value
from mpi_dasgd.tasks import convex

if TYPE_CHECKING:
    from mpi_dasgd.simulation.simulator import Simulator

__all__ = ["RunMeter", "collect_metrics"]


class RunMeter:
    """Counts what happens in a simulation, in virtual time.

    Attributes:
        exchange_counts: number of exchange records by kind.
        ages, ages_s: steps and seconds since the partner's state was made, per exchange.
        delays: gradients of other ranks while a gradient was computed, per gradient; empty for an
            algorithm that measures delays itself.
        waits: number of times that a rank waited in the middle of a step.
        wait_time: sum of these times over all ranks.
    """

    def __init__(self) -> None:
        self.exchange_counts = {INITIATED: 0, ABSORBED: 0, SKIPPED: 0, APPLIED: 0}
        # Arrays take 8 bytes per element: there may be millions.
        self.ages, self.ages_s, self.delays = array("q"), array("d"), array("q")
        self.waits = 0
        self.wait_time = 0.0

    def record(self, exchange: ExchangeRecord) -> None:
        """Count an exchange."""
        self.exchange_counts[exchange.kind] += 1
        if exchange.kind in (INITIATED, APPLIED):
            self.ages.append(exchange.step - exchange.partner_step)
            self.ages_s.append(exchange.age_s)


def collect_metrics(run: Simulator, wall_seconds: float) -> dict[str, object]:
    """Return the metrics of a simulation that has run and is not drained yet, by their JSON keys.

    The consensus distance keeps its old name there: `max_disagreement`, `final_disagreement`.

    Args:
        run: the simulation.
        wall_seconds: real time that it took.
    """
    meter, trace = run.meter, run.trace
    mean, conservation_error = run.mean_model(), None
    if run.algorithms[0].capabilities.preserves_mean:
        mass = total_mass(run.algorithms, run.network.memory)
        conservation_error = run.oracle.error(mass, run.models)
        mean = mass / run.size
    metrics = {
        "name": run.config.run.name,
        "algorithm": run.config.algorithm.name,
        "codec": run.codecs[0].name,
        "topology": run.config.topology.graph,
        "ranks": run.size,
        "gradients": run.gradients,
        "effective_step": _effective_step(run, mean),
        "max_disagreement": max(trace.consensus_distance),
        "final_disagreement": trace.consensus_distance[-1],
        "final_distance": trace.distance[-1],
        "excess_loss": run.problem.value(mean) - run.problem.value(run.problem.optimum),
        "conservation_error": conservation_error,
        "waits": meter.waits,
        "wait_time": meter.wait_time,
        "exchanges": meter.exchange_counts[INITIATED],
        "skipped": meter.exchange_counts[SKIPPED],
        "bytes_per_message": run.codecs[0].layout.nbytes,
        "rejected": _rejected_share(run),
        "staleness_mean": np.mean(meter.ages) if meter.ages else None,
        "staleness_max": max(meter.ages) if meter.ages else None,
        "set_staleness_mean": run.set_staleness.average if run.set_staleness else None,
        "set_staleness_max": run.set_staleness.maximum if run.set_staleness else None,
        "delay_mean": np.mean(meter.delays) if meter.delays else None,
        "delay_max": max(meter.delays) if meter.delays else None,
        "virtual_time": run.clock.now,
        "events": run.clock.events,
        "seconds": wall_seconds,
        "events_per_second": run.clock.events / wall_seconds,
        "diverged": run.diverged,
    }
    return {name: json_value(value) for name, value in metrics.items()}


def _rejected_share(run: Simulator) -> float | None:
    """Return the share of buckets that could not be decoded; None for a codec that decodes all."""
    counters = [codec.counters for codec in run.codecs]
    if not counters[0]:
        return None
    rejected = sum(c["buckets_rejected"] for c in counters)
    return rejected / max(1, rejected + sum(c["buckets_decoded"] for c in counters))


def _effective_step(run: Simulator, mean: np.ndarray) -> float | None:
    """Return the decay of the mean over that of SGD with T/n steps; None where it is not defined.

    On coordinate k of a noise-free quadratic one gradient of n ranks multiplies the mean by
    (1 - eta c_k)^(1/n) if its effective step is 1.
    """
    problem, config = run.problem, run.config
    if (
        not isinstance(problem, convex.Quadratic)
        or problem.noise
        or not config.simulation.gradients
        or config.schedule.name != "constant"
        or config.schedule.warmup
        or any(config.optimizer.options.values())
        or run.diverged
    ):
        return None
    expected = np.log1p(-config.optimizer.lr * problem.curvature) * run.gradients / run.size
    ratio = mean / problem.start
    if not (ratio > 0).all():
        return None
    return float(np.log(ratio).sum() / expected.sum())
