"""A codec operation on one backend, with the baseline that `bench kernel` compares it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Call", "Seconds", "TimedOperation", "do_nothing", "no_baseline"]

Call = Callable[[], None]
Seconds = Callable[[], float]
"""Runs something and returns the seconds that one run took."""


def do_nothing() -> None:
    """Do nothing: `prepare` or `check` of an operation that needs none."""


def no_baseline() -> float:
    """Return NaN: the time of a baseline that does not exist."""
    return float("nan")


@dataclass
class TimedOperation:
    """One operation on one backend, and its baseline.

    Attributes:
        op: name of the operation.
        backend: instruction set, ``numpy``, ``cuda``, or ``libc`` for memcpy.
        bits: bits per code; 0 for an operation without codes.
        elements: length of the model.
        traffic: bytes read and written per element.
        baseline: ``trivial`` for a roofline loop of the same traffic, ``fused`` for the same
            operation in one pass, empty for none.
        baseline_variant: which of several such loops was fastest, as ``AVX2 streamed``.
        run: runs the operation.
        run_baseline: runs the baseline.
        prepare: called before each measurement, untimed.
        check: runs the operation once more and compares the results with the NumPy reference.
        max_rounds: rounds in which it takes part at most.
    """

    op: str
    backend: str
    bits: int
    elements: int
    traffic: float
    baseline: str
    baseline_variant: str
    run: Seconds
    run_baseline: Seconds
    prepare: Call
    check: Call
    max_rounds: int = 10**9
