"""Timings of `bench kernel`: samples of each operation, their summary, and the printed table.

Stored columns and JSON keys call the baseline "yardstick" and its kind "against": these are the
names in existing files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpi_dasgd.bench.sample_store import columns_of, quartiles
from mpi_dasgd.bench.timed_operation import TimedOperation

__all__ = ["WARM_UP", "Timings", "columns", "gpu_lines", "table"]

WARM_UP = 1
"""Rounds that do not count; the baselines were calibrated on the same arrays before."""


@dataclass
class Timings:
    """Samples of one operation, in the order of the rounds, warm-up first.

    Attributes:
        operation: what was timed.
        seconds: time of each round.
        baseline_before, baseline_after: times of the baseline directly before and after, seconds.
    """

    operation: TimedOperation
    seconds: list[float] = field(default_factory=list)
    baseline_before: list[float] = field(default_factory=list)
    baseline_after: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """Add one sample."""
        operation = self.operation
        operation.prepare()
        self.baseline_before.append(operation.run_baseline())
        self.seconds.append(operation.run())
        self.baseline_after.append(operation.run_baseline())

    def summary(self, threads: int) -> dict[str, Any]:
        """Return a row of the report: statistics of all rounds but the warm-up.

        Args:
            threads: number of CPU threads, which the row repeats.
        """
        operation = self.operation
        seconds, before, after = (
            np.array(samples[WARM_UP:])
            for samples in (self.seconds, self.baseline_before, self.baseline_after)
        )
        q1, median, q3 = quartiles(seconds * 1e3)
        row = {
            "op": operation.op,
            "backend": operation.backend,
            "bits": operation.bits,
            "elements": operation.elements,
            "threads": threads,
            "bytes_per_element": operation.traffic,
            "samples": seconds.size,
            "q1_ms": q1,
            "median_ms": median,
            "q3_ms": q3,
            "min_ms": seconds.min() * 1e3,
            "gb_per_s": operation.elements * operation.traffic / median / 1e6,
            "yardstick": operation.baseline_variant,
            "ratio_to_trivial": None,
            "ratio_to_fused": None,
        }
        if operation.baseline:
            ratios = quartiles(seconds / ((before + after) / 2))
            baseline = np.concatenate([before, after])
            row[f"ratio_to_{operation.baseline}"] = ratios.median
            row["ratio_q1"], row["ratio_q3"] = ratios.q1, ratios.q3
            row["ratio_of_min"] = seconds.min() / baseline.min()
            row["yardstick_median_ms"] = float(np.median(baseline)) * 1e3
            row["yardstick_min_ms"] = baseline.min() * 1e3
            if operation.backend == "cuda":
                row["percent_of_copy"] = 100 / ratios.median
        return row


def columns(timings: Sequence[Timings]) -> dict[str, list[Any]]:
    """Return the columns of the raw samples, one row per sample; all times are in seconds."""
    return columns_of(
        {
            "op": timing.operation.op,
            "backend": timing.operation.backend,
            "bits": timing.operation.bits,
            "elements": timing.operation.elements,
            "against": timing.operation.baseline,
            "how": timing.operation.baseline_variant,
            "round": number,
            "warm_up": number < WARM_UP,
            "seconds": seconds,
            "yardstick_before_seconds": before,
            "yardstick_after_seconds": after,
        }
        for timing in timings
        for number, (seconds, before, after) in enumerate(
            zip(timing.seconds, timing.baseline_before, timing.baseline_after, strict=True)
        )
    )


_PAIR_AVERAGING = ("encode", "apply", "exchange", "fused")


def gpu_lines(rows: Sequence[dict[str, Any]], device: str) -> list[str]:
    """Return one line about each size on the GPU: its operations as shares of a copy's bandwidth.

    Those of pair averaging come first: tables may cut the line.

    Args:
        rows: rows of `Timings.summary`.
        device: name of the GPU.
    """
    lines: dict[tuple[int, int], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["op"] not in _PAIR_AVERAGING):
        if "percent_of_copy" in row:
            share = f"{row['op']} {row['percent_of_copy'] / 100:.2f}"
            lines.setdefault((row["elements"], row["bits"]), []).append(share)
    return [
        f"KERNEL {elements} elements, {bits} bits on {device}, of a copy: {', '.join(shares)}"
        for (elements, bits), shares in lines.items()
    ]


def table(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Return the lines of the printed table.

    Args:
        rows: rows of `Timings.summary`.
        settings: settings of the run, with ``kernels``, ``threads``, ``device`` and the load.
    """
    lines = [
        f"{settings['kernels']}, threads: {settings['threads']}, device: {settings['device']}, "
        f"load: {settings['load_before']:.1f} before, {settings['load_after']:.1f} after",
        f"{'op':<22}{'backend':<9}{'bits':>4}{'elements':>11}{'median ms':>11}{'min ms':>10}"
        f"{'GB/s':>7}{'ratio':>8}{'q1 .. q3':>18}{'of min':>8}{'samples':>9}  of",
    ]
    for row in rows:
        line = (
            f"{row['op']:<22}{row['backend']:<9}{row['bits'] or '':>4}{row['elements']:>11}"
            f"{row['median_ms']:>11.3f}{row['min_ms']:>10.3f}{row['gb_per_s']:>7.1f}"
        )
        ratio = row["ratio_to_trivial"] or row["ratio_to_fused"]
        if ratio is None:
            lines.append(f"{line}{row['samples']:>43}")
            continue
        spread = f"{row['ratio_q1']:.2f} .. {row['ratio_q3']:.2f}"
        baseline = "fused" if row["ratio_to_fused"] else f"trivial ({row['yardstick']})"
        if "percent_of_copy" in row:
            baseline = f"a copy, whose bandwidth it has to {row['percent_of_copy']:.0f} %"
        lines.append(
            f"{line}{ratio:>8.2f}{spread:>18}{row['ratio_of_min']:>8.2f}{row['samples']:>9}"
            f"  {baseline}"
        )
    return lines
