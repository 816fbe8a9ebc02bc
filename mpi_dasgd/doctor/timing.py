"""Durations of repeated calls, and their percentiles as values and as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["describe_latencies", "latency_percentiles", "time_calls"]


def time_calls(
    operation: Callable[[], object], seconds: float, max_calls: int = 3000
) -> list[float]:
    """Time repeated calls of `operation`.

    Args:
        operation: function to call; it is called at least once.
        seconds: time after which no further call starts.
        max_calls: number of calls after which no further call starts.

    Returns:
        Duration of each call in seconds.
    """
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while not durations or (time.perf_counter() < end and len(durations) < max_calls):
        start = time.perf_counter()
        operation()
        durations.append(time.perf_counter() - start)
    return durations


def latency_percentiles(operation: str, durations: list[float]) -> dict[str, float]:
    """Return median and 99th percentile of `durations`.

    Args:
        operation: name of the operation, prefix of the keys.
        durations: seconds; may be empty.

    Returns:
        ``{"<operation>_us": median, "<operation>_p99_us": percentile}`` in microseconds; empty
        without durations.
    """
    if not durations:
        return {}
    median, p99 = np.percentile(durations, (50, 99)) * 1e6
    return {f"{operation}_us": float(median), f"{operation}_p99_us": float(p99)}


def describe_latencies(latencies: Mapping[str, float]) -> str:
    """Return one line for the user.

    Args:
        latencies: items of `latency_percentiles` of any number of operations.
    """
    operations = [key.removesuffix("_us") for key in latencies if not key.endswith("_p99_us")]
    return ", ".join(
        f"{operation.capitalize()} {_format_time(latencies[f'{operation}_us'])} "
        f"(p99 {_format_time(latencies[f'{operation}_p99_us'])})"
        for operation in operations
    )


def _format_time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1000:.3g} ms"
