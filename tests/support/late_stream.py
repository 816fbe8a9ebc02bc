"""A stream whose work is done when it is asked for, but whose marks and results come later."""

from __future__ import annotations

import math

import torch

__all__ = ["LateMark", "LateStream"]


class LateMark:
    """A mark that is passed when the stream says so."""

    def __init__(self, stream: LateStream, number: int) -> None:
        self._stream = stream
        self.number = number
        self.time = stream.clock

    @property
    def is_done(self) -> bool:
        """Whether the stream has come so far."""
        return self.number <= self._stream.passed

    def wait(self) -> None:
        """Have the stream come so far, and note who waited if it had not."""
        if not self.is_done:
            self._stream.waited.append(self.number)
            self._stream.pass_to(self.number)

    def seconds_since(self, earlier: LateMark) -> float:
        """Return the time of the stream between two marks; both must be done."""
        assert self.is_done and earlier.is_done, "the time of a mark that is not passed"
        return self.time - earlier.time


class LateStream:
    """A `DeviceStream` in host memory.

    Args:
        lag: marks that are not passed yet, until more are asked for or somebody waits; None: all.

    Attributes:
        clock: time of the device in seconds: add to it what work takes.
        asked: number of the newest mark.
        passed: number of the newest mark that is passed; -1 at the beginning.
        waited: numbers of the marks for which somebody had to wait.
        busy: seconds for which it was kept busy.
    """

    def __init__(self, lag: int | None = None) -> None:
        self.clock = 0.0
        self.asked = self.passed = -1
        self.waited: list[int] = []
        self.busy: list[float] = []
        self._lag = lag
        self._results: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy."""
        return tensor.clone()

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return NaN, which become the values when the next mark is passed."""
        host = torch.full_like(tensor, math.nan)
        self._results.append((self.asked + 1, host, tensor.clone()))
        return host

    def mark(self) -> LateMark:
        """Return the next mark."""
        self.asked += 1
        if self._lag is not None:
            self.pass_to(self.asked - self._lag)
        return LateMark(self, self.asked)

    def pass_to(self, number: int) -> None:
        """Pass a mark and all before it."""
        self.passed = max(self.passed, number)
        for due, host, value in self._results:
            if due <= self.passed:
                host.copy_(value)
        self._results = [result for result in self._results if result[0] > self.passed]

    def keep_busy(self, seconds: float) -> None:
        """Let the clock run."""
        self.busy.append(seconds)
        self.clock += seconds
